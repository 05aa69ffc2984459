"""Several processes that share one run, by JAX's distributed runtime.

It serves membership, a store of keys and values, and heartbeats. Nothing is computed across
processes. Process 0 leads: it hosts JAX's coordination service, chooses what all must have in common,
and finishes the run.

How a group ends:

| what happens to one process | what the others do |
|---|---|
| it ends with an error | they end with its line and its code, within seconds |
| it is killed, or its host is lost | they end with `LOST_PROCESS` after the time-out |
| process 0 is killed | the same at once: its connections close |
| SIGTERM | they stop as well: each finishes its batches in flight and exits with `RUN_AGAIN` |
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import jax

from jaxgrad import stopping
from jaxgrad.cluster import Place, find_place
from jaxgrad.errors import BAD_INPUT, INTERRUPTED, LOST_PROCESS, RUN_AGAIN, UserError
from jaxgrad.runtime import AbortHook, connect, disconnect, quiet, reach
from jaxgrad.stopping import Stopped

DEFAULT_TIMEOUT = 60
# Machines of one job do not start in one second: the group may take this many time-outs to assemble.
JOIN_TIMEOUTS = 5
LOOK_SECONDS = 0.5  # between two looks at how the others do
FAREWELL_SECONDS = 5.0  # that process 0 waits for the others to have read why it ends
_GO_ON = "finished batches are kept: run the same command again on all hosts"


class Group:
    """The processes of a run; this class is a process on its own, for which all is at hand.

    Attributes:
        process_id: this process, from 0.
        num_processes: how many there are.
        patience: seconds that what another process wrote may take to show up in a shared folder.
    """

    process_id, num_processes, patience = 0, 1, 0.0

    def __init__(self) -> None:
        self._counters: Counter[str] = Counter()
        self._num_runs = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that leads."""
        return self.process_id == 0

    def begin_run(self) -> str:
        """A name for what is exchanged about a run; all processes begin the same runs in one order."""
        self._counters.clear()
        self._num_runs += 1
        return f"run-{self._num_runs}"

    def from_leader(self, name: str, make: Callable[[], str]) -> str:
        """What `make` gives in process 0, for all.

        Args:
            name: of this exchange, the same in all processes and used once.
            make: called in process 0 alone.

        Raises:
            Stopped: the group was asked to stop while this process waited.
        """
        return make()

    def gather(
        self, name: str, value: str, *, meanwhile: Callable[[], None] = lambda: None
    ) -> list[str]:
        """The values of all processes, in their order, once all have given theirs.

        Args:
            name: as in `from_leader`.
            value: this process's.
            meanwhile: called again and again while this process waits.

        Raises:
            Stopped: the group was asked to stop while this process waited.
        """
        return [value]

    def assemble(self, name: str) -> None:
        """Waits until every other process is here or has ended; a request to stop does not end it."""

    def add(self, name: str, amount: int) -> int:
        """Adds to a number that all processes share; returns it."""
        self._counters[name] += amount
        return self._counters[name]

    def warn(self, line: str) -> None:
        """A line on stderr that also those print which do not lead."""
        print(self.told(line), file=sys.stderr, flush=True)

    def told(self, line: str) -> str:
        """The line, with the process's number where it does not lead."""
        return line if self.leads else f"process {self.process_id}: {line}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        pass


ALONE = Group()


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = DEFAULT_TIMEOUT,
) -> Group:
    """The group of processes that this one belongs to, by flags or by its environment.

    To be called before JAX's first computation, and used in a `with`: leaving it tells the others how
    this process ended.

    Args:
        coordinator: see `find_place`.
        num_processes: see `find_place`.
        process_id: see `find_place`.
        timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
        UserError: the flags are incomplete or out of range, or the group cannot be joined. (JAX ends the
            process where it cannot reach the coordinator; then that line is printed and the exit code
            is `LOST_PROCESS`, after `JOIN_TIMEOUTS` + 1 time-outs at most.)
    """
    place = find_place(coordinator, num_processes, process_id, timeout=JOIN_TIMEOUTS * timeout)
    return ALONE if place is None else _Joined(place, timeout)


class _Joined(Group):
    """A process of several, in JAX's distributed runtime."""

    def __init__(self, place: Place, timeout: int) -> None:
        super().__init__()
        self.process_id, self.num_processes = place.process_id, place.num_processes
        self.patience, self._place, self._timeout = float(timeout), place, timeout
        self._others = [k for k in range(self.num_processes) if k != self.process_id]
        # then "running"; "done" while it waits for others to be; "leaving" once it misses nobody
        self._phase: str = "joining"
        self._code = 0  # that this process ends with, once it leaves
        self._ending, self._heard = threading.Lock(), 0.0
        self._incarnations: dict[int, int] = {}
        self._abort = AbortHook(self._on_abort)
        quiet(4)
        try:
            self._client = connect(
                place, join_timeout=JOIN_TIMEOUTS * timeout, heartbeat_timeout=timeout
            )
        except UserError:
            self._abort.remove()
            raise
        # Errors of XLA's own are to be seen again, but not what JAX says of a group that lost process 0.
        quiet(1 if self.leads else 4)
        if not self._set(f"joined/{self.process_id}", socket.gethostname()):
            raise UserError(
                f"process {self.process_id} of {self.num_processes} is in this group already, or was "
                "before it was started anew: end all processes, then start them with the same command"
            )
        self._phase = "running"
        stopping.keep_threads()
        stopping.at_once_by(self._stop_at_once)
        for watch in (self._watch_notes, self._watch_members):
            threading.Thread(target=self._watch, args=(watch,), daemon=True).start()
        # All open their devices at the same time: JAX has them wait for each other here.
        jax.local_devices()

    # What the run asks of its group.

    def from_leader(self, name: str, make: Callable[[], str]) -> str:
        if self.leads:
            value = make()
            self._set(name, value)
            return value
        while (found := self._get(name, wait=LOOK_SECONDS)) is None:
            stopping.raise_if_requested()
        return found

    def gather(
        self, name: str, value: str, *, meanwhile: Callable[[], None] = lambda: None
    ) -> list[str]:
        self._set(f"{name}/{self.process_id}", value)
        while len(values := self._folder(name)) < self.num_processes:
            stopping.raise_if_requested()
            meanwhile()
            time.sleep(0.05)
        return [values[k] for k in range(self.num_processes)]

    def assemble(self, name: str) -> None:
        self._set(f"{name}/{self.process_id}", "")
        missing = set(self._others)
        while missing := missing - self._folder(name).keys() - self._folder("ended").keys():
            time.sleep(0.05)

    def add(self, name: str, amount: int) -> int:
        return self._call(self._client.key_value_increment, f"count/{name}", amount)

    # How it ends.

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._part(0)
        elif isinstance(error, Stopped):
            self._publish(RUN_AGAIN, str(error))
            self._part(RUN_AGAIN)
            raise Stopped(self.told(str(error))) from error
        elif isinstance(error, UserError):
            self._publish(BAD_INPUT, str(error))
            self._part(BAD_INPUT)
            raise type(error)(self.told(str(error))) from error
        elif isinstance(error, KeyboardInterrupt):
            self._publish(INTERRUPTED, "interrupted")
            self._part(INTERRUPTED)
        else:
            told = (str(error).strip().splitlines() or [""])[0]
            self._publish(1, f"{type(error).__name__}: {told}")
            self._part(1)

    def _publish(self, code: int, line: str) -> None:
        """Tells the others why this process ends."""
        self._set(f"ended/{self.process_id}", json.dumps({"code": code, "line": line}))

    def _part(self, code: int) -> None:
        """Leaves the group; process 0, without which there is none, is the last."""
        with self._ending:
            if self._phase == "leaving":  # a thread that watches ends this process at this moment
                time.sleep(self._timeout)
            self._code, self._phase = code, "done"
        if code == 0 or (code == RUN_AGAIN and self.leads):
            # Not before all are done: who still works needs process 0, and notices who is gone.
            with contextlib.suppress(
                jax.errors.JaxRuntimeError
            ):  # process 0 is gone: all were done
                self.assemble("leaving")
        else:
            self._set(f"leaving/{self.process_id}", "")
        self._phase = "leaving"
        if self.leads:
            self._see_off()
        disconnect()
        self._abort.remove()
        stopping.at_once_by(None)

    def _see_off(self) -> None:
        until = time.monotonic() + FAREWELL_SECONDS
        missing = set(self._others)
        while missing and time.monotonic() < until:
            missing -= self._folder("leaving").keys() | self._folder("ended").keys()
            time.sleep(0.05)
        # They have said so; now they hang up, and would take it ill if this process did so first.
        time.sleep(0.3)

    def _end(self, code: int, line: str) -> None:
        """Ends the process from a thread that watches."""
        with self._ending:
            if self._phase == "leaving":
                return
            self._code, self._phase = code, "leaving"
        self._set(f"leaving/{self.process_id}", "")
        if self.leads:
            self._see_off()
        stopping.exit_now(code, f"error: {self.told(line)}")

    def _stop_at_once(self) -> None:
        """A request to stop while nothing is in flight."""
        with self._ending:
            if self._phase != "running" or self._code == RUN_AGAIN:
                return
            self._code = RUN_AGAIN
        line = stopping.line()
        self._set("stop", "")
        self._publish(RUN_AGAIN, line)
        if self.leads:
            self.assemble("leaving")
        self._phase = "leaving"
        stopping.exit_now(RUN_AGAIN, self.told(line))

    # How the others do.

    def _watch(self, look: Callable[[], None]) -> None:
        """Looks again and again until this process leaves, or nobody answers because others have left."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while self._phase in ("running", "done"):
                look()
                time.sleep(LOOK_SECONDS)

    def _watch_notes(self) -> None:
        """Looks for what the others tell: an error that ends the run, or a request to stop."""
        asked = self._get("stop") is not None
        for k, note in self._folder("ended").items():
            ended = json.loads(note)
            if k != self.process_id and ended["code"] != RUN_AGAIN:
                self._end(ended["code"], f"process {k} ended: {ended['line']}")
            asked |= ended["code"] == RUN_AGAIN
        if asked and not stopping.requested():
            stopping.request()
        elif stopping.requested() and not asked:
            self._set("stop", "")

    def _watch_members(self) -> None:
        """Asks JAX who is alive. The call waits for all that are, so it has a thread of its own."""
        live = self._call(self._client.get_live_nodes, list(range(self.num_processes)))
        for k in self._others:
            # A process that came back is another one: its start says so to itself.
            if k in live and self._incarnations.setdefault(k, live[k]) == live[k]:
                continue
            if k not in self._folder("ended") and k not in self._folder("leaving"):
                self._end(LOST_PROCESS, self._lost(k))

    def _lost(self, k: int) -> str:
        return f"process {k} of {self.num_processes} has died or cannot be reached; {_GO_ON}"

    def _on_abort(self) -> None:
        """JAX aborts a process that cannot join, or that has lost process 0 (its C++ code does)."""
        if self._phase == "joining":
            stopping.exit_now(LOST_PROCESS, f"error: {self._cannot_join()}")
        if self._phase in ("done", "leaving"):
            os._exit(self._code)
        if not self.leads and not self._leader_answers():
            stopping.exit_now(LOST_PROCESS, f"error: {self.told(self._lost(0))}")
        # Something else: the process dies of it, as any would.
        print(
            self.told(
                "aborted inside native code; TF_CPP_MIN_LOG_LEVEL=0 shows what it says of itself"
            ),
            file=sys.stderr,
            flush=True,
        )

    def _leader_answers(self) -> bool:
        """Whether process 0 is there. It is not asked: JAX's client would wait for this very thread."""
        until = time.monotonic() + 4 * LOOK_SECONDS
        while time.monotonic() < until:
            try:
                reach(self._place.coordinator)
            except OSError:
                return False
            time.sleep(0.1)
        # The threads that watch go on meanwhile, and hear from it if it is there.
        return time.monotonic() - self._heard < 3 * LOOK_SECONDS

    def _cannot_join(self) -> str:
        place, waited = self._place, JOIN_TIMEOUTS * self._timeout
        who = f"process {place.process_id} of {place.num_processes} cannot join the others"
        try:
            if not self.leads:
                reach(place.coordinator)
        except OSError as error:
            return f"{who}: nobody answers at {place.coordinator} within {waited} s ({error})"
        return (
            f"{who} at {place.coordinator}: some did not come within {waited} s, --num_processes is not "
            "the same in all, or --process_id was given twice"
        )

    # JAX's store. Keys are set once.

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One question to the service; where process 0 has died, JAX ends this process meanwhile."""
        try:
            found = function(*arguments)
            self._heard = time.monotonic()
            return found
        except jax.errors.JaxRuntimeError as error:
            answered = str(error).startswith(("NOT_FOUND", "ALREADY_EXISTS", "DEADLINE_EXCEEDED"))
            if answered or self._phase != "running":
                raise
            time.sleep(self._timeout + FAREWELL_SECONDS)
            stopping.exit_now(LOST_PROCESS, f"error: {self.told(self._lost(0))}")

    def _set(self, key: str, value: str) -> bool:
        """Whether the key was not there before."""
        try:
            self._call(self._client.key_value_set, key, value)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _get(self, key: str, wait: float = 0.0) -> str | None:
        try:
            if wait:
                return self._call(self._client.blocking_key_value_get, key, int(wait * 1000))
            return self._call(self._client.key_value_try_get, key)
        except jax.errors.JaxRuntimeError:
            return None

    def _folder(self, name: str) -> dict[int, str]:
        """Values by process of a folder whose keys are processes."""
        found = self._call(self._client.key_value_dir_get, f"{name}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}
