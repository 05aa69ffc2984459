"""Errors that are the user's to mend.

Everything a user can cause (a missing file, a broken record, an unsupported model) raises `UserError`
with one line that says what is wrong, where, and how to mend it. The binaries print that line and exit
with code 2; any other exception is a bug of ours and keeps its traceback.
"""

# Exit codes of the binaries: what the user has to mend; a process of the group that died or cannot be
# reached; "run me again" (EX_TEMPFAIL of sysexits.h); Ctrl-C. Both middle ones: the same command continues.
BAD_INPUT, LOST_PROCESS, RUN_AGAIN, INTERRUPTED = 2, 69, 75, 130


class UserError(Exception):
    """A bad input. The message is one line: what, where, how to mend."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OutputError(UserError):
    """The output directory cannot be used: full, locked, unwritable, or another run's.

    Going on with other data or another model would not help, unlike after any other `UserError`.
    """
