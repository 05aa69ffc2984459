"""Find the interpreter that jaxgrad is installed in, so that `bin/NAME` works as it stands."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def use_project_environment() -> None:
    """Go on under the checkout's .venv when this interpreter has no jaxgrad; one line if none has."""
    if importlib.util.find_spec("jaxgrad") and importlib.util.find_spec("jax"):
        return
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(python, [str(python), *sys.argv])
    sys.exit("error: jaxgrad is not installed here: run bin/demo once, or `pip install .`")


def run_command(name: str) -> NoReturn:
    """`jaxgrad NAME`, for the script bin/NAME."""
    use_project_environment()
    from jaxgrad import commands
    from jaxgrad.commands.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()
    sys.exit(commands.run_command(name, sys.argv[1:], f"bin/{name}"))
