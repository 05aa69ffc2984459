"""The program `jaxgrad`: the installed command, and `python -m jaxgrad`."""

import os
import sys
from typing import NoReturn

from jaxgrad.commands import dispatch
from jaxgrad.commands.huge_pages import restart_with_huge_pages


def main() -> NoReturn:
    """Run the command that this process was started for."""
    restart_with_huge_pages()
    installed = os.path.basename(sys.argv[0]) != os.path.basename(__file__)
    sys.exit(dispatch(sys.argv[1:], "jaxgrad" if installed else "python -m jaxgrad"))


if __name__ == "__main__":
    main()
