"""The group of processes that share one run, and how it ends.

The processes share a store of keys and values, and see who is alive. Process 0 leads: it hosts JAX's
coordination service, chooses what all must have in common, and finishes the run.

Nothing is computed across processes, unless a mesh spans them (`models.sharding`). There a process that
ends leaves the others in a program that fails or never finishes. The watching threads end them.

How a group ends:

| what happens to one process | what the others do |
|---|---|
| it ends with an error | they end with its line and its exit code, within seconds |
| it is killed, or its host is lost | they end with `LOST_PROCESS` after the time-out |
| process 0 is killed | the same, at once: its connections close |
| SIGTERM | they stop too: each finishes its batches in flight and exits with `RUN_AGAIN` |

Keys of the group (those of a run are in `exchange`), K a process:

| key | value |
|---|---|
| joined/K | the name of K's host |
| stop | set once somebody was asked to stop |
| ended/K | why K ends, as JSON: exit code and line. Not set if all is well |
| leaving/K | set once K is done |
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self

import jax

from jaxgrad.errors import BAD_INPUT, INTERRUPTED, LOST_PROCESS, RUN_AGAIN, UserError
from jaxgrad.processes import stopping
from jaxgrad.processes.exchange import ENDED, POLL_SECONDS, Exchange, InMemory, await_others
from jaxgrad.processes.place import Place, find_place
from jaxgrad.processes.runtime import AbortHook, connect, disconnect, print_native_from, reach
from jaxgrad.processes.stopping import Stopped

DEFAULT_TIMEOUT = 60
# The machines of a job do not all start at the same moment: a group has this many time-outs to assemble.
JOIN_TIMEOUTS = 5
WATCH_SECONDS = 0.5  # between two checks of how the others are
FAREWELL_SECONDS = 5.0  # process 0 gives the others this long to read why it ends
_GO_ON = "finished batches are kept: run the same command again on all hosts"


class Group:
    """The processes that share a run. This class is the group of a process on its own.

    Used in a `with`: leaving it tells the others how this process ended.

    Attributes:
        process_id: this process, from 0.
        num_processes: how many there are.
        patience: seconds to wait until a file that another process wrote is visible here.
    """

    process_id: int = 0
    num_processes: int = 1
    patience: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which leads."""
        return self.process_id == 0

    def begin_run(self) -> Exchange:
        """The exchange of values in one run. All processes begin the same runs in the same order."""
        return Exchange(InMemory(), "run", process_id=0, num_processes=1)

    def await_verdict(self) -> None:
        """Waits for the watching threads, after a program across the processes has failed here.

        Most often it fails because another process has ended. Then this process ends in this call, as
        the table above says. The call returns if nobody has.
        """

    def warn(self, line: str) -> None:
        """Prints a line on stderr, whether this process leads or not."""
        print(self.told(line), file=sys.stderr, flush=True)

    def told(self, line: str) -> str:
        """The line as this process prints it: with its number, unless it leads."""
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
    """The group that this process belongs to, by flags or by its environment.

    To be called before JAX's first computation.

    Args:
        coordinator: see `find_place`.
        num_processes: see `find_place`.
        process_id: see `find_place`.
        timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
        UserError: the flags are incomplete or out of range, or the group cannot be joined. (If JAX cannot
            reach the coordinator, it ends the process: one line is printed and the exit code is
            `LOST_PROCESS`, after at most `JOIN_TIMEOUTS` + 1 time-outs.)
    """
    place = find_place(coordinator, num_processes, process_id, timeout=JOIN_TIMEOUTS * timeout)
    return ALONE if place is None else _Joined(place, timeout)


class _Joined(Group):
    """A process of several, in JAX's distributed runtime."""

    def __init__(self, place: Place, timeout: int) -> None:
        self.process_id, self.num_processes = place.process_id, place.num_processes
        self.patience, self._place, self._timeout = float(timeout), place, timeout
        self._others = [k for k in range(self.num_processes) if k != self.process_id]
        self._num_runs = 0
        # "done": its work is, and it waits for others. "leaving": it no longer needs them.
        self._phase: Literal["joining", "running", "done", "leaving"] = "joining"
        self._exit_code = 0  # what it is once this process is done
        self._ending = threading.Lock()  # held to change phase and exit code
        self._incarnations: dict[int, int] = {}  # of the others, as first seen
        self._abort_hook = AbortHook(self._on_abort)
        print_native_from(4)
        try:
            self._service = connect(
                place,
                join_timeout=JOIN_TIMEOUTS * timeout,
                heartbeat_timeout=timeout,
                on_silence=self._on_silence,
            )
        except UserError:
            self._abort_hook.remove()
            raise
        # XLA's errors are printed again. In followers they are not: JAX would print that process 0 is lost.
        print_native_from(1 if self.leads else 4)
        if not self._service.put(f"joined/{self.process_id}", socket.gethostname()):
            raise UserError(
                f"process {self.process_id} of {self.num_processes} is in this group already, or was "
                "before it was started anew: end all processes, then start them with the same command"
            )
        self._phase = "running"
        stopping.keep_threads()
        stopping.set_exit_action(self._stop_at_once)
        for look in (self._look_at_notes, self._look_at_members):
            threading.Thread(target=self._watch, args=(look,), daemon=True).start()
        # All processes open their devices now, because JAX makes them wait for each other in this call.
        jax.local_devices()

    def begin_run(self) -> Exchange:
        self._num_runs += 1
        return Exchange(
            self._service,
            f"run-{self._num_runs}",
            process_id=self.process_id,
            num_processes=self.num_processes,
        )

    def await_verdict(self) -> None:
        # A process that is lost is noticed after the time-out; what one says as it ends, at once.
        time.sleep(self._timeout + FAREWELL_SECONDS + 4 * WATCH_SECONDS)

    # How this process ends.

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._leave(0)
        elif isinstance(error, Stopped):
            self._publish(RUN_AGAIN, str(error))
            self._leave(RUN_AGAIN)
            raise Stopped(self.told(str(error))) from error
        elif isinstance(error, UserError):
            self._publish(BAD_INPUT, str(error))
            self._leave(BAD_INPUT)
            raise type(error)(self.told(str(error))) from error
        elif isinstance(error, KeyboardInterrupt):
            self._publish(INTERRUPTED, "interrupted")
            self._leave(INTERRUPTED)
        else:
            first_line = (str(error).strip().splitlines() or [""])[0]
            self._publish(1, f"{type(error).__name__}: {first_line}")
            self._leave(1)

    def _publish(self, exit_code: int, line: str) -> None:
        """Tells the others why this process ends."""
        note = json.dumps({"code": exit_code, "line": line})
        self._service.put(f"{ENDED}/{self.process_id}", note)

    def _leave(self, exit_code: int) -> None:
        """Leaves the group. Process 0 is the last to leave, because it hosts the service."""
        with self._ending:
            if self._phase == "leaving":  # a watching thread is ending this process right now
                time.sleep(self._timeout)
            self._exit_code, self._phase = exit_code, "done"
        if exit_code == 0 or (exit_code == RUN_AGAIN and self.leads):
            # Wait for all: those at work need process 0, and take a process that is gone for dead.
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 left: all were done
                self._await_others_leaving()
        else:
            self._service.put(f"leaving/{self.process_id}", "")
        self._phase = "leaving"
        if self.leads:
            self._see_off()
        disconnect()
        self._abort_hook.remove()
        stopping.set_exit_action(None)

    def _await_others_leaving(self) -> None:
        await_others(
            self._service,
            "leaving",
            process_id=self.process_id,
            num_processes=self.num_processes,
        )

    def _see_off(self) -> None:
        """Process 0 waits until all others know that the group ends."""
        until = time.monotonic() + FAREWELL_SECONDS
        missing = set(self._others)
        while missing and time.monotonic() < until:
            missing -= self._service.folder("leaving").keys() | self._service.folder(ENDED).keys()
            time.sleep(POLL_SECONDS)
        # Followers disconnect first; losing the server aborts them.
        time.sleep(0.3)

    def _end(self, exit_code: int, line: str) -> None:
        """Ends the process, from a watching thread."""
        with self._ending:
            if self._phase == "leaving":
                return
            self._exit_code, self._phase = exit_code, "leaving"
        self._service.put(f"leaving/{self.process_id}", "")
        if self.leads:
            self._see_off()
        stopping.exit_now(exit_code, f"error: {self.told(line)}")

    def _stop_at_once(self) -> None:
        """Ends the process on a request to stop while nothing is in flight."""
        with self._ending:
            if self._phase != "running" or self._exit_code == RUN_AGAIN:
                return
            self._exit_code = RUN_AGAIN
        line = stopping.line()
        self._service.put("stop", "")
        self._publish(RUN_AGAIN, line)
        if self.leads:
            self._await_others_leaving()
        self._phase = "leaving"
        stopping.exit_now(RUN_AGAIN, self.told(line))

    # How the others are.

    def _watch(self, look: Callable[[], None]) -> None:
        """Calls `look` again and again until this process leaves, or the service is gone."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while self._phase in ("running", "done"):
                look()
                time.sleep(WATCH_SECONDS)

    def _look_at_notes(self) -> None:
        """Reads what the others publish: an error ends this process, a request to stop is passed on."""
        asked_to_stop = self._service.get("stop") is not None
        for k, text in self._service.folder(ENDED).items():
            note = json.loads(text)
            if k != self.process_id and note["code"] != RUN_AGAIN:
                self._end(note["code"], f"process {k} ended: {note['line']}")
            asked_to_stop |= note["code"] == RUN_AGAIN
        if asked_to_stop and not stopping.requested():
            stopping.request()
        elif stopping.requested() and not asked_to_stop:
            self._service.put("stop", "")

    def _look_at_members(self) -> None:
        """Asks who is alive. In a thread of its own, because the call waits for all live processes."""
        live = self._service.live(range(self.num_processes))
        for k in self._others:
            # A restarted process has another incarnation. It counts as dead, and cannot join again.
            if k in live and self._incarnations.setdefault(k, live[k]) == live[k]:
                continue
            if k not in self._service.folder(ENDED) and k not in self._service.folder("leaving"):
                self._end(LOST_PROCESS, self._lost(k))

    def _lost(self, k: int) -> str:
        return f"process {k} of {self.num_processes} has died or cannot be reached; {_GO_ON}"

    def _on_silence(self) -> None:
        """The service did not answer, so process 0 has died. JAX most often ends this process first."""
        if self._phase != "running":
            return
        time.sleep(self._timeout + FAREWELL_SECONDS)
        stopping.exit_now(LOST_PROCESS, f"error: {self.told(self._lost(0))}")

    def _on_abort(self) -> None:
        """JAX's C++ code aborts this process: it cannot join, or has lost process 0."""
        if self._phase == "joining":
            stopping.exit_now(LOST_PROCESS, f"error: {self._cannot_join()}")
        if self._phase in ("done", "leaving"):
            os._exit(self._exit_code)
        if not self.leads and not self._leader_answers():
            stopping.exit_now(LOST_PROCESS, f"error: {self.told(self._lost(0))}")
        # Another reason, which has nothing to do with the group: the abort goes on.
        self.warn("aborted inside native code; TF_CPP_MIN_LOG_LEVEL=0 shows what it says of itself")

    def _leader_answers(self) -> bool:
        """Whether process 0 is alive.

        This thread cannot ask it, because JAX's client would wait for this same thread. So it looks
        whether the port is open, and whether the watching threads still get answers.
        """
        until = time.monotonic() + 4 * WATCH_SECONDS
        while time.monotonic() < until:
            try:
                reach(self._place.coordinator)
            except OSError:
                return False
            time.sleep(0.1)
        return time.monotonic() - self._service.heard < 3 * WATCH_SECONDS

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
