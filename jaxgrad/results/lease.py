"""A lock for places that have none of their own: an object that its owner renews.

Object stores, and some network file systems, cannot lock. There the process that writes a run keeps
`lock.json` in it, with who it is and when it last said so. It says so every 15 s; after 60 s of silence
it is taken for dead and another may take the lease over. A process that was only asleep finds out before
it writes again.

| who comes | finds | what happens |
|---|---|---|
| one | nothing | creates the lease, which only one can, and reads it back |
| another | a lease younger than 60 s | waits; is refused as soon as the owner renews it, which takes 15 s |
| another | an older or unreadable one | writes its own, waits, has won if its own is still there |
| the owner, late | another's | is refused when it next writes |

So the restart of a run that was killed waits for a minute at most, and needs no second try.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from jaxgrad.errors import OutputError

LEASE = "lock.json"
RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
# Longer than lies between reading a dead owner's lease and writing one's own.
SETTLE_SECONDS = 2.0
LOOK_SECONDS = 1.0  # between two looks at whether the owner of a lease is alive
_log = logging.getLogger(__name__)


class Lease:
    """The right to write a place. It belongs to this object: another one in this process is refused.

    Args:
        file_system: One of fsspec's.
        path: Of the lease's object in it.
        place: What it guards, for messages.
    """

    def __init__(self, file_system: Any, path: str, place: str) -> None:
        self._file_system, self._path, self._place = file_system, path, place
        self._owner = secrets.token_hex(16)
        self._renewed = 0.0
        self._lost: str | None = None
        self._ended = threading.Event()
        # The thread that renews must not write after the release.
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Takes the lease and keeps it until `release` or the process's end.

        Raises:
            OutputError: Another holds it. What the file system raises passes.
        """
        found = self._read()
        if found is not None and not self._falls_silent(found):
            found = None
        if found is None:
            with contextlib.suppress(FileExistsError):
                self._create()
        else:
            _log.warning(
                "the process that was writing %s (%s) has been silent for %.0f s: taken over",
                self._place,
                _who(found),
                time.time() - found["time"],
            )
            self._write()
            time.sleep(SETTLE_SECONDS)
        winner = self._read()
        if winner is None or winner["owner"] != self._owner:
            raise self._refusal(winner)
        threading.Thread(target=self._keep, name=f"lease of {self._place}", daemon=True).start()

    def _falls_silent(self, found: dict[str, Any]) -> bool:
        """Waits until a lease is as old as a dead process's; False when it is given free meanwhile.

        Raises:
            OutputError: Its owner renews it.
        """
        # Of clocks that differ by more no more than this minute is believed.
        left = min(EXPIRE_SECONDS, EXPIRE_SECONDS - (time.time() - found["time"]))
        until = time.monotonic() + left
        if left > 0:
            _log.warning(
                "%s is being written by %s, or was until that was killed: waiting up to %.0f s to see",
                self._place,
                _who(found),
                left,
            )
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            seen = self._read()
            if seen is None:
                return False
            if (seen["owner"], seen["time"]) != (found["owner"], found["time"]):
                raise self._refusal(seen)
        return True

    def check(self) -> None:
        """Makes sure, before something is written, that the lease is still held.

        Raises:
            OutputError: It is another's now. What the file system raises passes.
        """
        # After a sleep of the machine this thread may be awake before the one that renews.
        if time.monotonic() - self._renewed > EXPIRE_SECONDS / 2:
            self._renew()
        if self._lost is not None:
            raise OutputError(
                f"Another process took over {self._place} while this one was silent ({self._lost}). "
                "This one stops; what it recorded is kept."
            )

    def release(self) -> None:
        """Gives the place free; harmless when the lease is not held."""
        with self._guard:
            if self._ended.is_set():
                return
            self._ended.set()
            # What remains is another's, or expires by itself.
            with contextlib.suppress(Exception):
                found = self._read()
                if found is not None and found["owner"] == self._owner:
                    self._file_system.rm_file(self._path)

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self._renew()
            except Exception as error:
                # The next attempt may succeed; if none does, `check` says so before a write.
                _log.info("the lease of %s could not be renewed: %s", self._place, error)

    def _renew(self) -> None:
        with self._guard:
            if self._ended.is_set() or self._lost is not None:
                return
            found = self._read()
            if found is not None and found["owner"] != self._owner:
                self._lost = _who(found)
            else:
                self._write()

    def _content(self) -> bytes:
        who = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**who, "time": time.time()}).encode()

    def _create(self) -> None:
        if isinstance(self._file_system, LocalFileSystem):
            with self._file_system.open(self._path, "xb") as file:
                file.write(self._content())
        else:
            self._file_system.pipe_file(self._path, self._content(), mode="create")
        self._renewed = time.monotonic()

    def _write(self) -> None:
        self._file_system.pipe_file(self._path, self._content())
        self._renewed = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        """The lease that is there; one that cannot be read is nobody's and old."""
        kinds = {"owner": str, "host": str, "pid": int, "time": float}
        for _ in range(3):
            try:
                found = json.loads(self._file_system.cat_file(self._path))
            except FileNotFoundError:
                return None
            except ValueError:
                found = None
            if isinstance(found, dict) and all(
                isinstance(found.get(name), kind) for name, kind in kinds.items()
            ):
                return found
            # On a network disk it may be seen half written.
            time.sleep(0.1)
        return {"owner": "", "host": "an unknown host", "pid": 0, "time": 0.0}

    def _refusal(self, holder: dict[str, Any] | None) -> OutputError:
        who = "" if holder is None else f" ({_who(holder)})"
        return OutputError(
            f"Another process{who} is writing {self._place}. Wait for it, or give another --output_dir."
        )


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
