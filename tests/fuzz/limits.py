"""Limits for one input, on Linux: time, memory that it touches, memory that it allocates."""

import contextlib
import gc
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS = 10.0
TOUCHED_BYTES = 512 * 2**20
ASKED_BYTES = 1024 * 2**20


class LimitError(AssertionError):
    """An input exceeded a limit."""


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Run the block under all three limits.

    Raises `LimitError`; the process may die if a library cannot allocate.
    """

    def raise_limit_error(number: int, frame: object) -> None:
        raise LimitError(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # A chat template's own time limit uses SIGALRM, so this one is on CPU time.
    previous_handler = signal.signal(signal.SIGVTALRM, raise_limit_error)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resident, began = _status("VmRSS"), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ASKED_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, previous_handler)
    grown = _status("VmHWM") - resident
    if grown > TOUCHED_BYTES:
        gc.collect()
        raise LimitError(f"{grown / 2**20:.0f} MiB touched")
    if time.monotonic() - began > SECONDS:
        raise LimitError(f"{time.monotonic() - began:.1f} s")
