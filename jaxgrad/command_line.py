"""What every command does around its library call: help, errors, signals, exit codes."""

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from jaxgrad.errors import BAD_INPUT, INTERRUPTED, RUN_AGAIN, UserError
from jaxgrad.paths import expanded
from jaxgrad.processes import stopping


@dataclasses.dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together in --help."""

    title: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `jaxgrad.commands`; the fields are what `run` takes.

    Attributes:
        define_flags: defines the command's flags; to be called once in a process.
    """

    main: Callable[[], int | None]
    description: str
    define_flags: Callable[[], list[FlagGroup]]
    after_interrupt: str = "nothing was written"
    more_of: str | None = None

    def run(self, program: str, arguments: Sequence[str]) -> NoReturn:
        """The command, as `program`, with its arguments; ends the process."""
        run(
            self.main,
            self.description,
            self.define_flags(),
            program=program,
            arguments=arguments,
            after_interrupt=self.after_interrupt,
            more_of=self.more_of,
        )


def run(
    main: Callable[[], int | None],
    description: str,
    groups: Sequence[FlagGroup],
    *,
    program: str | None = None,
    arguments: Sequence[str] | None = None,
    after_interrupt: str = "nothing was written",
    more_of: str | None = None,
) -> NoReturn:
    """Parse the flags, call `main`, and end the process with an exit code.

    | code | when | stderr |
    |---|---|---|
    | 0, or what `main` returns | it returned | |
    | 2 | `UserError`, or a bad flag | one line |
    | 75 | stopped by SIGTERM | one line that says how to go on |
    | 130 | Ctrl-C | the same |
    | 1 | any other exception | its traceback |

    Args:
        main: reads `flags.FLAGS`; imports JAX, so that --help and bad flags do not wait for it.
        description: of --help.
        groups: the flags of --help. They are defined before this call.
        program: what --help calls the program, such as "jaxgrad analyze". None: the name of its file.
        arguments: None for those of this process.
        after_interrupt: how to go on after Ctrl-C.
        more_of: a flag. Arguments that follow it and are no flags are further values of it.
    """
    program = program or os.path.basename(sys.argv[0])
    arguments = sys.argv[1:] if arguments is None else arguments
    stopping.catch_sigterm()
    # Compiled programs are kept between runs, so the second analysis of a model starts at once.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxgrad/compiled")
    )
    # No advice of transformers' (that torch is missing, say).
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def parse(argv: list[str]) -> list[str]:
        if any(word in ("--help", "-h", "-help") for word in argv[1:]):
            print(help_text(program, description, groups))
            sys.exit(0)
        try:
            rest = flags.FLAGS(_flag_for_each(argv, more_of))
        except flags.Error as error:
            fail(f"{error} (--help lists the flags)")
        if len(rest) > 1:
            fail(f"argument {rest[1]!r} is not a flag: give --name=value (--help lists the flags)")
        return rest

    def guarded(_: list[str]) -> int | None:
        # absl shows INFO by default, and JAX lists there the backends that it did not find.
        logging.set_verbosity(logging.WARNING)
        try:
            return main()
        except UserError as error:
            fail(str(error))
        except stopping.Stopped as stopped:
            stopping.exit_now(RUN_AGAIN, f"\n{stopped}")
        except KeyboardInterrupt:
            _end_interrupted(after_interrupt)

    def unraisable(failure: Any) -> None:
        # Python only prints a Ctrl-C that arrives inside a destructor or a callback of the garbage
        # collector (JAX has one), and the program would go on.
        if isinstance(failure.exc_value, KeyboardInterrupt):
            _end_interrupted(after_interrupt)
        sys.__unraisablehook__(failure)

    sys.unraisablehook = unraisable
    try:
        app.run(guarded, argv=[program, *arguments], flags_parser=parse)
    except SystemExit as ended:
        if stopping.threads_stay() and isinstance(ended.code, int | None):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code or 0)
        raise
    raise AssertionError("app.run always exits")


def _end_interrupted(after_interrupt: str) -> NoReturn:
    # At once: XLA's threads may be at work on a batch for minutes.
    stopping.exit_now(INTERRUPTED, f"\ninterrupted: {after_interrupt}")


def _flag_for_each(arguments: list[str], name: str | None) -> list[str]:
    """--NAME A B --other as --NAME=A --NAME=B --other."""
    spread, collecting = [], False
    for argument in arguments:
        if argument == f"--{name}":
            collecting = True
        elif collecting and not argument.startswith("-"):
            spread.append(f"--{name}={argument}")
        else:
            collecting = argument.startswith(f"--{name}=")
            spread.append(argument)
    return spread


def fail(message: str) -> NoReturn:
    """End the process with exit code 2 and this message, in one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def required(name: str, what: str) -> str:
    """The value of a flag that has to be given.

    Raises:
        UserError: it was not; `what` says what to give.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing: {what}")
    return value


class _PathParser(flags.ArgumentParser):
    """Expands ~ and environment variables, also in URLs, where the shell does not."""

    def parse(self, argument: str) -> str:
        try:
            return expanded(argument)
        except UserError as error:
            raise ValueError(str(error)) from None

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, help_: str) -> None:
    """A flag that takes a path or a URL; None where it is not given."""
    flags.DEFINE(_PathParser(), name, None, help_, serializer=flags.ArgumentSerializer())


def split_pair(name: str, value: str) -> tuple[str, str]:
    """A=B, a value of the flag `name`, as (A, B).

    Raises:
        UserError: it has another form.
    """
    first, equals, second = value.partition("=")
    if not (first.strip() and equals and second.strip()):
        raise UserError(f"--{name}: {value!r} is not of the form A=B")
    return first.strip(), second.strip()


def help_text(program: str, description: str, groups: Sequence[FlagGroup]) -> str:
    """The text of --help: the description, then each group's flags with defaults and meanings."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [f"usage: {program} [--flag=value ...]", "", *textwrap.wrap(description, width)]
    for group in groups:
        lines += ["", f"{group.title}:"]
        for name in group.names:
            flag = flags.FLAGS[name]
            lines.append(f"  --{flag_usage(name, flag)}")
            lines += textwrap.wrap(
                flag_meaning(flag), width, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
    return "\n".join(lines)


def flag_meaning(flag: Any) -> str:
    """What a flag is for, in words."""
    # absl puts an enum's values before its help, where the usage has them already, and behind a list's
    # help how to repeat it.
    text = flag.help.split(";\n    repeat this option", 1)[0]
    return text.split(">: ", 1)[1] if text.startswith("<") else text


def flag_usage(name: str, flag: Any) -> str:
    """How a flag is given, with its default: "method=auto|factored|dense  (default: auto)"."""
    if flag.boolean:
        return f"[no]{name}  (default: {'yes' if flag.default else 'no'})"
    choices = getattr(flag.parser, "enum_values", None)
    if isinstance(flag.parser, flags.ListParser):
        value, shown = "A,B", ",".join(flag.default)
    else:
        value = "|".join(choices) if choices else flag.parser.flag_type().upper()
        shown = flag.default
    default = "" if shown in (None, "", []) else f"  (default: {shown})"
    return f"{name}={value}{default}"
