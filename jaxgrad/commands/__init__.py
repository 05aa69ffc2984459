"""The commands. `jaxgrad NAME`, `python -m jaxgrad NAME` and `bin/NAME` are the same function.

`commands.NAME` is a command: flags -> one library call. It is imported when it is chosen, defines its
flags then, and imports JAX once they were read. `flag_groups` has the flags that commands share.
"""

import importlib
import importlib.metadata
from collections.abc import Sequence

from jaxgrad.command_line import fail

COMMANDS = {
    "analyze": "measure the gradients of every example of a data file",
    "study": "measure a declared grid of models and data sets, and report on it",
    "report": "tables, figures and a page from finished runs",
    "compare": "measure with jaxgrad and with PyTorch, and compare",
    "convert": "write a model as an Orbax checkpoint",
    "export": "write a finished run as the authors' JSONL",
    "summarize": "print the means of finished runs side by side",
}


def dispatch(arguments: Sequence[str], program: str = "jaxgrad") -> int | None:
    """Run the command that the first argument names.

    Args:
        arguments: the command and its own arguments, or --help, or --version.
        program: what --help and errors call this program.

    Returns:
        The exit code. Bad input, and no or an unknown command, end the process with 2 and one line.
    """
    known = f"there are {', '.join(COMMANDS)} ({program} --help)"
    if not arguments:
        fail(f"no command is given; {known}")
    first, *rest = arguments
    if first in ("--help", "-h", "-help"):
        print(_help(program))
        return 0
    if first == "--version":
        print(f"jaxgrad {importlib.metadata.version('jaxgrad')}")
        return 0
    if first not in COMMANDS:
        fail(f"{first!r} is no command; {known}")
    return run_command(first, rest, f"{program} {first}")


def run_command(name: str, arguments: Sequence[str], program: str) -> int | None:
    """Run a command with its arguments, as `program`; once in a process, because of its flags."""
    return importlib.import_module(f"{__name__}.{name}").run(program, arguments)


def _help(program: str) -> str:
    lines = [f"  {name:10s} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND [--flag=value ...]",
            "",
            "What a training example does to a language model, by the spectra of its gradients.",
            "",
            "Commands:",
            *lines,
            "",
            f"{program} COMMAND --help lists a command's flags, {program} --version says the version.",
        ]
    )
