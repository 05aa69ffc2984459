"""What the processes of a group tell each other during one run, as JSON values.

All processes make the same calls in the same order. So a call needs no name: it is numbered here.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

from jaxgrad.processes import stopping

# The folder in which a process that fails or stops says why. See `jaxgrad.processes.group`.
ENDED = "ended"

_LEADER_SECONDS = 0.5  # longest wait for process 0 between two checks for a request to stop
POLL_SECONDS = 0.05
_FIRST_POLL_SECONDS = 0.001  # of a vote, which all processes come to at about the same time


class KeyValues(Protocol):
    """Keys and values that all processes of a group share. A key is set once."""

    def put(self, key: str, value: str) -> bool:
        """Sets a key. False, and no change, if it is set already."""

    def get(self, key: str, wait: float = 0.0) -> str | None:
        """The value of a key. None if it is not set within `wait` seconds."""

    def folder(self, name: str) -> dict[int, str]:
        """The values of the keys `name`/K, by process K."""

    def add(self, key: str, amount: int) -> int:
        """Adds to a shared number, 0 at first. Returns the sum."""

    def drop(self, name: str) -> None:
        """Removes the keys `name`/K."""


class InMemory:
    """`KeyValues` of a process on its own."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def put(self, key: str, value: str) -> bool:
        """See `KeyValues`."""
        if key in self._values:
            return False
        self._values[key] = value
        return True

    def get(self, key: str, wait: float = 0.0) -> str | None:
        """See `KeyValues`; never waits, because no other process could set the key."""
        return self._values.get(key)

    def folder(self, name: str) -> dict[int, str]:
        """See `KeyValues`."""
        prefix = f"{name}/"
        found = self._values.items()
        return {int(k.removeprefix(prefix)): v for k, v in found if k.startswith(prefix)}

    def add(self, key: str, amount: int) -> int:
        """See `KeyValues`."""
        self._numbers[key] = self._numbers.get(key, 0) + amount
        return self._numbers[key]

    def drop(self, name: str) -> None:
        """See `KeyValues`."""
        for key in [key for key in self._values if key.startswith(f"{name}/")]:
            del self._values[key]


class Exchange:
    """The exchange of values in one run, from `Group.begin_run`.

    Values are what `json.dumps` takes. Every process gets them as they come back from JSON: tuples are
    lists and the keys of a dict are strings, also in the process that gave them.
    """

    def __init__(
        self, key_values: KeyValues, run: str, *, process_id: int, num_processes: int
    ) -> None:
        """Begins an exchange.

        Args:
            key_values: shared by all processes of the group.
            run: the first part of all keys: the same in all processes, and another one for each run.
            process_id: this process, from 0.
            num_processes: how many there are.
        """
        self._key_values, self._run = key_values, run
        self._process_id, self._num_processes = process_id, num_processes
        self._num_calls = self._num_votes = 0

    @property
    def process_id(self) -> int:
        """This process, from 0."""
        return self._process_id

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return self._num_processes

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """The value that `make` gives in process 0, for all processes.

        Args:
            make: called in process 0 only.

        Raises:
            Stopped: the group was asked to stop while this process waited.
        """
        key = self._next_key()
        if self._process_id == 0:
            text = json.dumps(make())
            self._key_values.put(key, text)
            return json.loads(text)
        while (found := self._key_values.get(key, wait=_LEADER_SECONDS)) is None:
            stopping.raise_if_requested()
        return json.loads(found)

    def gather(self, value: Any, *, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """The values of all processes, by process id, once all have given theirs.

        Args:
            value: this process's.
            meanwhile: called again and again while this process waits for others.

        Raises:
            Stopped: the group was asked to stop while this process waited.
        """
        key = self._next_key()
        self._key_values.put(f"{key}/{self._process_id}", json.dumps(value))
        while len(texts := self._key_values.folder(key)) < self._num_processes:
            stopping.raise_if_requested()
            meanwhile()
            time.sleep(POLL_SECONDS)
        return [json.loads(texts[k]) for k in range(self._num_processes)]

    def wait_for_all(self, *, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits until all processes have made this call.

        Args:
            meanwhile: see `gather`.

        Raises:
            Stopped: the group was asked to stop while this process waited.
        """
        self.gather(None, meanwhile=meanwhile)

    def count(self, what: str, amount: int = 0) -> int:
        """Adds to a number of this run that all processes share, 0 at first; returns the sum.

        A process may make this call at any time and any number of times.

        Args:
            what: what is counted, such as "examples".
            amount: how many more.
        """
        return self._key_values.add(f"{self._run}/count/{what}", amount)

    def vote(self, value: Any) -> list[Any] | None:
        """The values of all processes, by process id, once all have voted; None if one never will.

        All get the same answer, and so agree on what to do next, such as to run one more program
        together. Votes are numbered apart from the other calls, so one thread may vote while another
        makes these. A request to stop does not interrupt a vote: a process that has begun to vote goes on
        to do so until one fails, or its values say that it is the last. One that ended before it voted
        fails the vote for all others.

        Args:
            value: this process's.
        """
        self._num_votes += 1
        key = f"{self._run}/vote/{self._num_votes}"
        self._key_values.put(f"{key}/{self._process_id}", json.dumps(value))
        wait = _FIRST_POLL_SECONDS
        while True:
            ended = self._key_values.folder(
                ENDED
            ).keys()  # asked first: a vote is cast before the end
            texts = self._key_values.folder(key)
            if len(texts) == self._num_processes:
                break
            if ended - texts.keys():
                return None
            time.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS)
        if self._process_id == 0 and self._num_votes > 1:
            # All have read the vote before, because they have cast this one.
            self._key_values.drop(f"{self._run}/vote/{self._num_votes - 1}")
        return [json.loads(texts[k]) for k in range(self._num_processes)]

    def await_stop(self) -> None:
        """Waits until every other process has made this call too, or has ended.

        For processes that were asked to stop: each calls it once, wherever it is in the run, after its
        last batch. A request to stop does not interrupt the wait.
        """
        await_others(
            self._key_values,
            f"{self._run}/stopped",
            process_id=self._process_id,
            num_processes=self._num_processes,
        )

    def _next_key(self) -> str:
        self._num_calls += 1
        return f"{self._run}/{self._num_calls}"


def await_others(
    key_values: KeyValues, folder: str, *, process_id: int, num_processes: int
) -> None:
    """Waits until every other process has made this call too, or has ended.

    Args:
        key_values: shared by all processes.
        folder: where each notes that it is here; used for nothing else.
        process_id: this process.
        num_processes: how many there are.
    """
    key_values.put(f"{folder}/{process_id}", "")
    missing = set(range(num_processes)) - {process_id}
    while missing := missing - key_values.folder(folder).keys() - key_values.folder(ENDED).keys():
        time.sleep(POLL_SECONDS)
