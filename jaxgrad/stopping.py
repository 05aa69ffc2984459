"""Ending well on SIGTERM, which schedulers send before they take a machine away.

A run that is asked to stop finishes the batches in flight, begins nothing new, and raises `Stopped`.
Where nothing is in flight that could be lost (while a model is loaded or a program is compiled) the
process ends at once.

The signal belongs to the process, and so does what this module keeps.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from jaxgrad.errors import RUN_AGAIN

_requested = threading.Event()
_lock = threading.Lock()
_in_flight = 0
_told = _NOTHING = "no batch was begun"
_threads_stay = False


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run stopped because it was asked to; the message is the line for the user."""


def line() -> str:
    """What a process says that was asked to stop."""
    return f"stopped by SIGTERM: {_told}: run the same command again"


def exit_now(code: int, told: str) -> NoReturn:
    """End the process with one line on stderr, from any thread; what is written is whole at any moment."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(told, file=sys.stderr, flush=True)
    os._exit(code)


def _exit_run_again() -> None:
    exit_now(RUN_AGAIN, line())


_at_once: Callable[[], None] = _exit_run_again


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested.is_set()


def request() -> None:
    """Ask the run to stop: after the batches in flight, or at once where there are none."""
    with _lock:
        _requested.set()
        waits = _in_flight > 0
    if not waits:
        _at_once()


def raise_if_requested() -> None:
    """Begin nothing new once a stop was asked for.

    Raises:
        Stopped: it was.
    """
    if requested():
        raise Stopped(line())


def note_start() -> None:
    """A run begins: what is told of progress is no longer an earlier run's."""
    global _told
    _told = _NOTHING


def note_progress(done: int, total: int) -> None:
    """What a process tells that ends at once."""
    global _told
    _told = f"{done} of {total} examples are done; finished batches are kept"


@contextlib.contextmanager
def finishing_batches() -> Iterator[None]:
    """Inside, a request to stop waits for who looks at `requested`.

    Raises:
        Stopped: the request was there before.
    """
    global _in_flight
    with _lock:
        raise_if_requested()
        _in_flight += 1
    try:
        yield
    finally:
        with _lock:
            _in_flight -= 1


def at_once_by(action: Callable[[], None] | None) -> None:
    """What ends the process where nothing is in flight; None for the usual exit."""
    global _at_once
    _at_once = action or _exit_run_again


def forget() -> None:
    """As if nothing had been asked for: for a process that goes on after a `Stopped`."""
    _requested.clear()
    note_start()


def keep_threads() -> None:
    """Tell that threads of this process may be inside JAX's C++ code when it ends.

    Python's own ending takes such a thread away where C++ does not let it go, and the process aborts
    after all its work is done. So the binaries end by `os._exit` then.
    """
    global _threads_stay
    _threads_stay = True


def threads_stay() -> bool:
    """Whether `keep_threads` was called."""
    return _threads_stay


def catch_sigterm() -> None:
    """Make SIGTERM a request to stop, from now on; the second one ends the process at once.

    To be called from the main thread. A thread waits for the signal, because Python's own handlers wait
    for the main thread, which may be inside a compilation for minutes.
    """
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, end == reading)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Python writes the number of a signal into the pipe where it has a handler of Python's.
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while True:
            for number in os.read(reading, 16):
                if number != signal.SIGTERM:
                    continue
                if requested():
                    exit_now(RUN_AGAIN, line())
                # Not here, so that a second signal is heard while the first is worked on.
                threading.Thread(target=request, name="stop", daemon=True).start()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
