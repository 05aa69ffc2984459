"""Limits on time and memory while a file's code runs, and that they are lifted afterwards."""

import resource
import signal
import threading
import time

import pytest

from jaxgrad.data.chat_template import OutOfTimeError, bounded


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    yield
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_loop_without_end_ends():
    began = time.monotonic()
    with pytest.raises(OutOfTimeError, match=r"more than 0\.2 s"), bounded(0.2, 2**30):
        while True:
            pass
    assert 0.2 <= time.monotonic() - began < 5


def test_memory_beyond_the_limit_is_refused():
    with pytest.raises(MemoryError), bounded(10, 2**28):
        bytes(2**30)
    assert len(bytes(2**30)) == 2**30


def test_what_keeps_within_both_is_untouched_and_errors_pass():
    with bounded(10, 2**28):
        assert len(bytes(2**20)) == 2**20
    with pytest.raises(KeyError), bounded(10, 2**28):
        {}["a"]


def test_on_another_thread_there_is_no_limit():
    found = []

    def work():
        with bounded(0.01, 2**20):
            time.sleep(0.05)
            found.append(len(bytes(2**28)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [2**28]
