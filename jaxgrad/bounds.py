"""Limits around work that a stranger's file directs, where the work itself has none.

A chat template is a program: jinja's sandbox keeps it from files, imports and attributes, but not from
loops inside loops or from strings of any length.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class OutOfTimeError(Exception):
    """The time is over."""


@contextlib.contextmanager
def bounded(seconds: float, more_bytes: int) -> Iterator[None]:
    """Runs the block's Python code under a limit of time, and of memory besides what there is.

    Both hold on the main thread of a Linux process alone, where every binary does such work. On another
    thread no signal arrives, and other threads would meet the limit on memory: there is none then. It is
    for pure Python: a library that cannot allocate may end the process.

    Args:
        seconds: of wall clock.
        more_bytes: of address space that the block may add to the process.

    Raises:
        OutOfTimeError: the time is over.
        MemoryError: the memory is.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    import resource

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"it takes more than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    limit = min(x for x in (limit, soft, hard) if x != resource.RLIM_INFINITY)
    before = signal.signal(signal.SIGALRM, over)
    try:
        try:
            # Again every second: where Python swallows exceptions (a destructor) the first is lost.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own: the signal may arrive in the line above
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
