"""Stopping cleanly on SIGTERM, which schedulers send before they take a machine away.

A run that is asked to stop finishes the batches in flight, starts no others, and raises `Stopped`. While
no batch is in flight (a model is being loaded, a program compiled) nothing can be lost, so the process
exits at once.

SIGTERM is sent to a process, so the state of this module is that of the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from jaxgrad.errors import RUN_AGAIN

_NO_PROGRESS = "no batch was begun"

_requested = threading.Event()
_lock = threading.Lock()
_in_flight = 0
_progress = _NO_PROGRESS
_threads_stay = False


class Stopped(Exception):  # noqa: N818 - it is not an error
    """A run stopped because it was asked to. The message is the line for the user."""


def line() -> str:
    """The line for the user of a process that was asked to stop."""
    return f"stopped by SIGTERM: {_progress}: run the same command again"


def exit_now(code: int, last_line: str) -> NoReturn:
    """Ends the process from any thread, with one line on stderr.

    No file needs closing: results are complete on disk at any moment.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(last_line, file=sys.stderr, flush=True)
    os._exit(code)


def _exit_run_again() -> None:
    exit_now(RUN_AGAIN, line())


_exit_action: Callable[[], None] = _exit_run_again


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested.is_set()


def request() -> None:
    """Asks the run to stop: after the batches in flight, or at once if there are none."""
    with _lock:
        _requested.set()
        waits = _in_flight > 0
    if not waits:
        _exit_action()


def raise_if_requested() -> None:
    """Called before something new is started.

    Raises:
        Stopped: this process was asked to stop.
    """
    if requested():
        raise Stopped(line())


def note_start() -> None:
    """A run begins: forgets the progress of the run before."""
    global _progress
    _progress = _NO_PROGRESS


def note_progress(done: int, total: int) -> None:
    """Sets the number of examples that `line` gives."""
    global _progress
    _progress = f"{done} of {total} examples are done; finished batches are kept"


@contextlib.contextmanager
def finishing_batches() -> Iterator[None]:
    """Batches are in flight. Inside, SIGTERM only sets a flag; the caller polls `requested()`.

    Raises:
        Stopped: this process was asked to stop before.
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


def set_exit_action(action: Callable[[], None] | None) -> None:
    """Sets what ends the process when nothing is in flight; None: it exits with `RUN_AGAIN`."""
    global _exit_action
    _exit_action = action or _exit_run_again


def keep_threads() -> None:
    """Notes that threads of this process may be inside JAX's C++ code when it ends.

    Python's normal exit kills such a thread inside C++, and that aborts the process after all its work
    is done. So the commands end by `os._exit` if this was called.
    """
    global _threads_stay
    _threads_stay = True


def threads_stay() -> bool:
    """Whether `keep_threads` was called."""
    return _threads_stay


def catch_sigterm() -> None:
    """From now on SIGTERM is a request to stop, and a second SIGTERM ends the process at once.

    To be called from the main thread. A thread of its own reads the signal: Python runs signal handlers
    in the main thread only, which may be inside a compilation for minutes.
    """
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, end == reading)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Python writes the signal's number into the pipe only if the signal has a Python handler.
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while True:
            for number in os.read(reading, 16):
                if number != signal.SIGTERM:
                    continue
                if requested():
                    exit_now(RUN_AGAIN, line())
                # In another thread, so that a second signal is read while the first is worked on.
                threading.Thread(target=request, name="stop", daemon=True).start()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
