"""Errors that are the user's to mend.

Everything a user can cause (a missing file, a broken record, an unsupported model) raises `UserError`
with one line that says what is wrong, where, and how to mend it. The binaries print that line and exit
with code 2; any other exception is a bug of ours and keeps its traceback.
"""

# Exit codes of the binaries: what the user has to mend; a process of the group that died or cannot be
# reached; "run me again" (EX_TEMPFAIL of sysexits.h); Ctrl-C. Both middle ones: the same command continues.
BAD_INPUT, LOST_PROCESS, RUN_AGAIN, INTERRUPTED = 2, 69, 75, 130

_LONGEST = 4000  # characters of a message


class UserError(Exception):
    """A bad input. The message is one line: what, where, how to mend.

    It may quote a file of a stranger's. What would steer a terminal, or cannot be printed at all, stands
    as its escape; of a message that is very long the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - 1000]} [...] {line[-900:]}"
        super().__init__(line)


class OutputError(UserError):
    """The output directory cannot be used: full, locked, unwritable, or another run's.

    Going on with other data or another model would not help, unlike after any other `UserError`.
    """


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up; such an error is no `Exception`, and has no public name."""
    return type(error).__name__ == "PanicException"
