"""Errors that users can cause and fix.

A missing file, a broken record or an unsupported model raises `UserError` with one line: what is
wrong, where, and how to fix it. The commands print that line and exit with code 2. Any other exception
is a bug and keeps its traceback.
"""

# Exit codes of the commands.
BAD_INPUT = 2  # a `UserError`
LOST_PROCESS = 69  # a process of the group died or cannot be reached; the same command continues
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
INTERRUPTED = 130  # Ctrl-C

_LONGEST = 4000  # characters of a message


class UserError(Exception):
    """Bad input. The message is one line: what, where, how to fix it.

    It may quote a file that is not trusted. So characters that control a terminal or cannot be printed are
    escaped, and the middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - 1000]} [...] {line[-900:]}"
        super().__init__(line)


class OutputError(UserError):
    """The output directory cannot be used: full, locked, not writable, or another run's.

    Unlike after other `UserError`s, going on with other data or another model would not help.
    """


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked. Such an error is no `Exception`, and its class is not public."""
    return type(error).__name__ == "PanicException"
