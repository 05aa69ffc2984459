"""`Exchange`: a process on its own, several as threads over a store in memory, several real ones."""

import json
import subprocess
import sys
import threading
import time

import pytest
from process_groups import environment, free_port

from jaxgrad.processes import stopping
from jaxgrad.processes.exchange import ENDED, Exchange, InMemory
from jaxgrad.processes.group import ALONE
from jaxgrad.processes.stopping import Stopped

SECONDS = 60.0  # longest time that a thread or a process of a test may take
VALUE = {"shape": (2, 3), 7: None, "none": [], "number": 0.1}
AS_JSON = {"shape": [2, 3], "7": None, "none": [], "number": 0.1}


class Shared(InMemory):
    """A store that threads share, as processes share JAX's."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def put(self, key, value):
        with self.lock:
            return super().put(key, value)

    def get(self, key, wait=0.0):
        until = time.monotonic() + wait
        while (value := super().get(key)) is None and time.monotonic() < until:
            time.sleep(0.002)
        return value

    def folder(self, name):
        with self.lock:
            return super().folder(name)

    def add(self, key, amount):
        with self.lock:
            return super().add(key, amount)

    def drop(self, name):
        with self.lock:
            super().drop(name)


@pytest.fixture
def asked_to_stop(monkeypatch):
    """An event: set, all threads of the test have been asked to stop."""
    event = threading.Event()
    monkeypatch.setattr(stopping, "_requested", event)
    return event


def exchanges(count, store=None, run="run-1"):
    store = store or Shared()
    return [Exchange(store, run, process_id=k, num_processes=count) for k in range(count)]


def start(work, *arguments):
    """A thread that runs `work`. `thread.found` is what it returned or raised."""

    def run():
        try:
            thread.found = work(*arguments)
        except BaseException as error:
            thread.found = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def ends(*threads):
    """What the threads return."""
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    return [thread.found for thread in threads]


def together(work, count):
    """What `work(k, exchange)` returns in each of several threads k."""
    return ends(*[start(work, k, exchange) for k, exchange in enumerate(exchanges(count))])


def test_a_process_on_its_own(asked_to_stop):
    assert ALONE.leads and (ALONE.process_id, ALONE.num_processes) == (0, 1)
    exchange = ALONE.begin_run()
    # It waits for nobody, so a request to stop does not matter.
    asked_to_stop.set()
    assert exchange.from_leader(lambda: VALUE) == AS_JSON
    assert exchange.from_leader(lambda: False) is False
    assert exchange.gather(VALUE) == [AS_JSON]
    exchange.wait_for_all()
    exchange.await_stop()


def test_runs_do_not_share_numbers():
    first, second = ALONE.begin_run(), ALONE.begin_run()
    assert first.count("examples", 3) == 3 and first.count("examples", 2) == 5
    assert first.count("examples") == 5 and first.count("window 3") == 0
    assert second.count("examples") == 0
    store = Shared()
    (first, _), (second, other) = exchanges(2, store), exchanges(2, store, "run-2")
    assert first.count("examples", 3) == 3
    assert second.count("examples", 1) == 1 and other.count("examples", 1) == 2


def test_several_get_the_same_values_in_the_order_of_their_calls():
    made = []

    def make(value):
        made.append(value)
        return value

    def work(k, exchange):
        return [
            exchange.from_leader(lambda: make(("first", k))),
            exchange.gather((k, k * k)),
            exchange.from_leader(lambda: make(VALUE)),
            exchange.gather([]),
            exchange.gather(None),
        ]

    found = together(work, 3)
    squares = [[0, 0], [1, 1], [2, 4]]
    assert found == [[["first", 0], squares, AS_JSON, [[], [], []], [None] * 3]] * 3
    assert made == [("first", 0), VALUE]  # in process 0 alone


def test_all_get_the_same_votes_and_none_is_left_over(asked_to_stop):
    """Three vote until one wants to stop. A request to stop interrupts nobody."""
    asked_to_stop.set()
    store = Shared()

    def work(k, exchange):
        rounds = []
        while not rounds or not any(stops for stops, _ in rounds[-1]):
            rounds.append(exchange.vote([k == 1 and len(rounds) == 4, k]))
        return rounds

    found = ends(*[start(work, k, exchange) for k, exchange in enumerate(exchanges(3, store))])
    go = [[False, 0], [False, 1], [False, 2]]
    assert found == [[*[go] * 4, [[False, 0], [True, 1], [False, 2]]]] * 3
    assert len(store.folder("run-1/vote/5")) == 3 and not store.folder("run-1/vote/4")


def test_a_vote_fails_for_all_if_one_ended_before_it(asked_to_stop):
    store = Shared()
    first, second, third = exchanges(3, store)
    voters = [start(first.vote, "a"), start(second.vote, "b")]
    time.sleep(0.1)
    assert all(voter.is_alive() for voter in voters)
    store.put(f"{ENDED}/2", "{}")
    assert ends(*voters) == [None, None]
    # One that has voted before it ends does not.
    store, run = Shared(), "run-2"
    first, second, third = exchanges(3, store, run)
    voters = [start(first.vote, "a"), start(third.vote, "c")]
    while len(store.folder(f"{run}/vote/1")) < 2:
        time.sleep(0.002)
    store.put(f"{ENDED}/2", "{}")
    voters.append(start(second.vote, "b"))
    assert ends(*voters) == [["a", "b", "c"]] * 3


def test_a_count_does_not_take_part_in_the_order_of_the_calls():
    def work(k, exchange):
        for _ in range(k):
            exchange.count("examples", 5)
        exchange.wait_for_all()
        return exchange.count("examples"), exchange.from_leader(lambda: "same")

    assert together(work, 3) == [(15, "same")] * 3


def test_nobody_passes_a_barrier_before_all_are_there():
    (first, second), calls = exchanges(2), []
    waiting = start(lambda: first.wait_for_all(meanwhile=lambda: calls.append(None)))
    until = time.monotonic() + SECONDS
    while len(calls) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert waiting.is_alive()
    second.wait_for_all(meanwhile=lambda: pytest.fail("the last one waits for nobody"))
    assert ends(waiting) == [None]


@pytest.mark.parametrize(
    "call", [lambda e: e.from_leader(dict), lambda e: e.gather(1), lambda e: e.wait_for_all()]
)
def test_a_request_to_stop_ends_a_wait_for_others(asked_to_stop, call):
    waiting = start(call, exchanges(2)[1])
    time.sleep(0.1)
    assert waiting.is_alive()
    asked_to_stop.set()
    (found,) = ends(waiting)
    assert isinstance(found, Stopped) and "run the same command again" in str(found)


def test_what_is_there_already_is_given_even_after_a_request_to_stop(asked_to_stop):
    leader, follower = exchanges(2)
    asked_to_stop.set()
    assert leader.from_leader(lambda: [1]) == follower.from_leader(lambda: [2]) == [1]


def test_processes_meet_to_stop_wherever_they_are_in_the_run(asked_to_stop):
    store = Shared()
    first, second, third = exchanges(3, store)
    first.from_leader(lambda: "the others have not read this")
    asked_to_stop.set()
    waiting = [start(first.await_stop), start(second.await_stop)]
    time.sleep(0.2)
    assert all(thread.is_alive() for thread in waiting)  # the request does not end this wait
    third.count("examples", 4)  # its last batch
    third.await_stop()
    assert ends(*waiting) == [None, None] and first.count("examples") == 4


def test_a_process_that_has_ended_is_not_waited_for(asked_to_stop):
    store = Shared()
    first, second, _ = exchanges(3, store)
    waiting = [start(first.await_stop), start(second.await_stop)]
    time.sleep(0.1)
    assert all(thread.is_alive() for thread in waiting)
    store.put(f"{ENDED}/2", "{}")
    assert ends(*waiting) == [None, None]


SCRIPT = """
import json, sys
from jaxgrad.processes.group import join

with join(sys.argv[1], 3, int(sys.argv[2]), timeout=20) as group:
    found = []
    for run in range(2):
        exchange = group.begin_run()
        k = group.process_id
        found.append(exchange.from_leader(lambda: {"leader": (k, run)}))
        found.append(exchange.gather([k, run]))
        for _ in range(k):
            exchange.count("examples", 5)
        exchange.wait_for_all()
        found.append(exchange.count("examples"))
        if k:  # at different points of the run
            exchange.await_stop()
        found.append(exchange.from_leader(lambda: None))
        if not k:
            exchange.await_stop()
print(json.dumps(found))
"""


def test_three_real_processes(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, where, str(k)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
        )
        for k in range(3)
    ]
    expected = []
    for run in range(2):
        expected += [{"leader": [0, run]}, [[k, run] for k in range(3)], 15, None]
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr
            assert json.loads(stdout) == expected
    finally:
        for process in processes:
            process.kill()
