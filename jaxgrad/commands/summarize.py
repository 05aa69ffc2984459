"""`jaxgrad summarize`: directories -> `summary_table`."""

from collections.abc import Sequence
from pathlib import Path

from jaxgrad.command_line import fail
from jaxgrad.paths import expanded

USAGE = """usage: {program} [LABEL=]DIR [[LABEL=]DIR ...]

Prints, for each finished run of analyze in DIR (a path or a URL), the nuclear norm of each projection's
gradient (mean over examples and layers) and its MAD (mean absolute difference from layer to layer of the
mean over examples). A run without LABEL is called by its directory's name."""


def label_of(argument: str) -> tuple[str, str]:
    """A run's label and its directory."""
    label, equals, path = argument.partition("=")
    if not equals or Path(expanded(argument)).exists() or "://" in label:
        return Path(argument).name, argument
    return label, path


def run(program: str, arguments: Sequence[str]) -> int:
    """Print the table; 2 and one line for a directory that holds no finished run."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE.format(program=program))
        return 0 if arguments else 2
    import jaxgrad

    try:
        directories = dict(map(label_of, arguments))
        runs = {label: jaxgrad.read_results(path) for label, path in directories.items()}
        table = jaxgrad.summary_table({label: run.matrices for label, run in runs.items()})
    except jaxgrad.UserError as error:
        fail(str(error))
    table.insert(0, ("", "examples"), [run.run["counts"]["ok"] for run in runs.values()])
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))
    return 0
