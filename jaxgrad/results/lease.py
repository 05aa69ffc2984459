"""A lease: a lock for file systems that have none, kept as an object that its owner renews.

Object stores and some network file systems cannot lock. There the process that writes a run keeps
`lock.json` beside it, which says who it is and when it last renewed it. It renews every 15 s. After 60 s
without a renewal the owner counts as dead, and another process may take the lease over. The owner checks
its lease before it writes, so one that was only suspended notices.

| who comes | finds | what happens |
|---|---|---|
| a process | no lease | creates it, which only one process can, and reads it back |
| another | a lease younger than 60 s | waits; refused as soon as the owner renews it, within 15 s |
| another | an older or unreadable lease | writes its own, waits, and has won if its own is still there |
| the owner, late | another's lease | refused when it next writes |

So the restart of a killed run waits for a minute at most, and needs no second try.
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
# Longer than the time between reading a dead owner's lease and writing one's own.
SETTLE_SECONDS = 2.0
LOOK_SECONDS = 1.0  # between two looks at whether the owner of a lease is alive
_log = logging.getLogger(__name__)


class Lease:
    """The right to write a directory. This object owns it: another one in this process is refused.

    Args:
        file_system: One of fsspec's.
        path: Of the lease's object in it.
        directory: What the lease is for, as messages name it.
    """

    def __init__(self, file_system: Any, path: str, directory: str) -> None:
        self._file_system, self._path, self._directory = file_system, path, directory
        self._owner = secrets.token_hex(16)
        self._renewed = 0.0  # when, by the monotonic clock
        self._new_owner: str | None = None
        self._released = threading.Event()
        # The renewing thread must not write after the release.
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Takes the lease, and renews it until `release` or the end of the process.

        Raises:
            OutputError: Another process holds it.
            Exception: What the file system raises passes.
        """
        found = self._read()
        if found is not None and not self._expires(found):
            found = None
        if found is None:
            with contextlib.suppress(FileExistsError):
                self._create()
        else:
            _log.warning(
                "the process that was writing %s (%s) has been silent for %.0f s: taken over",
                self._directory,
                _who(found),
                time.time() - found["time"],
            )
            self._write()
            time.sleep(SETTLE_SECONDS)
        winner = self._read()
        if winner is None or winner["owner"] != self._owner:
            raise self._refusal(winner)
        name = f"lease of {self._directory}"
        threading.Thread(target=self._keep_renewing, name=name, daemon=True).start()

    def _expires(self, found: dict[str, Any]) -> bool:
        """Waits until a lease is 60 s old; False if it is released before that.

        Raises:
            OutputError: Its owner renews it.
        """
        # The owner's clock may be ahead: never wait longer than 60 s.
        left = min(EXPIRE_SECONDS, EXPIRE_SECONDS - (time.time() - found["time"]))
        until = time.monotonic() + left
        if left > 0:
            _log.warning(
                "%s is being written by %s, or was until that was killed: waiting up to %.0f s to see",
                self._directory,
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
        """Makes sure that the lease is still held. Called before each write.

        Raises:
            OutputError: Another process has it now.
            Exception: What the file system raises passes.
        """
        # After the machine was suspended this thread may run before the renewing one.
        if time.monotonic() - self._renewed > EXPIRE_SECONDS / 2:
            self._renew()
        if self._new_owner is not None:
            raise OutputError(
                f"Another process took over {self._directory} while this one was silent "
                f"({self._new_owner}). This one stops; what it recorded is kept."
            )

    def release(self) -> None:
        """Removes the lease; harmless if it is not held."""
        with self._guard:
            if self._released.is_set():
                return
            self._released.set()
            # A lease that cannot be removed expires by itself.
            with contextlib.suppress(Exception):
                found = self._read()
                if found is not None and found["owner"] == self._owner:
                    self._file_system.rm_file(self._path)

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                self._renew()
            except Exception as error:
                # The next try may succeed. If none does, `check` raises before a write.
                _log.info("the lease of %s could not be renewed: %s", self._directory, error)

    def _renew(self) -> None:
        with self._guard:
            if self._released.is_set() or self._new_owner is not None:
                return
            found = self._read()
            if found is not None and found["owner"] != self._owner:
                self._new_owner = _who(found)
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
        """The lease that is there, if any. One that cannot be read counts as old and nobody's."""
        kinds = {"owner": str, "host": str, "pid": int, "time": float}
        for _ in range(3):
            try:
                found = json.loads(self._file_system.cat_file(self._path))
            except FileNotFoundError:
                return None
            except ValueError:
                found = None
            if isinstance(found, dict) and all(
                isinstance(found.get(key), kind) for key, kind in kinds.items()
            ):
                return found
            # On a network disk it may be seen half written.
            time.sleep(0.1)
        return {"owner": "", "host": "an unknown host", "pid": 0, "time": 0.0}

    def _refusal(self, holder: dict[str, Any] | None) -> OutputError:
        who = "" if holder is None else f" ({_who(holder)})"
        return OutputError(
            f"Another process{who} is writing {self._directory}. Wait for it, or give another "
            "--output_dir."
        )


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
