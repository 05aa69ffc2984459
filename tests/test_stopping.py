"""SIGTERM: batches in flight are finished and written, no others are begun, nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from process_groups import ANALYZE
from test_pipeline import (  # noqa: F401 - fixtures
    data_path,
    model_dir,
    parquet_bytes,
    run,
    undisturbed,
)

from jaxgrad.data.batches import Batch, BatchShape
from jaxgrad.errors import RUN_AGAIN
from jaxgrad.measure import stream
from jaxgrad.measure.programs import Programs
from jaxgrad.processes import stopping
from jaxgrad.processes.stopping import Stopped
from jaxgrad.runs import plan, windows


@pytest.fixture(autouse=True)
def restored():
    yield
    forget_request()
    stopping.set_exit_action(None)


def forget_request():
    """As in a new process."""
    stopping._requested.clear()
    stopping.note_start()


def test_a_request_waits_for_batches_and_ends_everything_else_at_once():
    ended = []
    stopping.set_exit_action(lambda: ended.append(True))
    with stopping.finishing_batches():
        stopping.request()
        assert stopping.requested() and not ended
    with pytest.raises(Stopped, match="run the same command again"), stopping.finishing_batches():
        raise AssertionError("begun after the request")
    forget_request()
    stopping.request()
    assert ended == [True]


def test_a_run_does_not_tell_the_progress_of_the_run_before():
    stopping.note_progress(6, 6)
    assert "6 of 6 examples are done" in stopping.line()
    stopping.note_start()
    assert "no batch was begun" in stopping.line()


def test_a_stopped_stream_gives_what_was_in_flight_and_begins_nothing(monkeypatch):
    """Whenever it stops, the results are those of the first batches, and of all that were begun."""
    monkeypatch.setattr(stream, "batches_in_flight", lambda _: 2)
    monkeypatch.setattr(stream, "batch_arrays", lambda batch, tokenized: batch.members)
    monkeypatch.setattr(stream, "example_results", lambda members, *_: list(members))

    class Counting:
        selection, mesh_shape, began = None, None, 0

        def measure(self, state, shape, arrays):
            self.began += 1
            time.sleep(0.002)
            return None, None

    class Model:
        state = config = None

    batches = [(range(9), Batch(BatchShape(1, 32, 16), (k,))) for k in range(9)]
    for stop_after in range(9):
        programs, found = Counting(), []
        results = stream.measured(
            programs, Model, batches, stop=lambda found=found, n=stop_after: len(found) >= n
        )
        for rows in results:
            found.append(rows)
        assert found == [[k] for k in range(len(found))]
        assert stop_after <= len(found) <= min(9, stop_after + 3)
        assert programs.began in (len(found), len(found) + 1)
    assert [len(rows) for rows in stream.measured(Counting(), Model, batches)] == [1] * 9


def test_a_stopped_run_keeps_its_batches_and_is_continued(
    model_dir,  # noqa: F811
    data_path,  # noqa: F811
    undisturbed,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(plan, "WINDOW", 7)
    monkeypatch.setattr(stream, "batches_in_flight", lambda _: 1)
    run(model_dir, data_path, tmp_path / "calm")
    original, calls = Programs.measure, []

    def measure(self, *arguments):
        calls.append(None)
        if len(calls) == 10:
            stopping.request()
        return original(self, *arguments)

    monkeypatch.setattr(Programs, "measure", measure)
    with pytest.raises(Stopped, match="10 of 28 examples are done"):
        run(model_dir, data_path, tmp_path / "stopped")
    assert len(calls) == 10
    with pytest.raises(Stopped):  # the next data file is not begun
        run(model_dir, data_path, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    forget_request()
    run(model_dir, data_path, tmp_path / "stopped")
    assert len(calls) == 28
    assert parquet_bytes(tmp_path / "stopped") == parquet_bytes(tmp_path / "calm")


def test_sigterm_while_the_model_is_loaded_ends_at_once(model_dir, tmp_path):  # noqa: F811
    """The data file is a named pipe: the program waits in a read, where no Python handler runs."""
    os.mkfifo(tmp_path / "data.json")
    command = [sys.executable, str(ANALYZE), f"--model_path={model_dir}"]
    command += [f"--data_path={tmp_path / 'data.json'}", f"--output_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = f"/proc/{process.pid}/status"
    caught = 0
    deadline = time.monotonic() + 60
    while not caught >> (signal.SIGTERM - 1) & 1 and time.monotonic() < deadline:
        time.sleep(0.01)
        with open(status) as lines:
            caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == RUN_AGAIN == 75, stderr
    assert "stopped by SIGTERM: no batch was begun: run the same command again" in stderr
    assert "Traceback" not in stderr and not (tmp_path / "out").exists()


def test_batches_are_divided_evenly_and_the_same_everywhere():
    rng = np.random.default_rng(0)
    shapes = [BatchShape(int(n), int(t), 16) for n, t in rng.integers(1, 40, (200, 2))]
    batches = [Batch(shape, (0,)) for shape in shapes]
    for count in (1, 2, 3, 7):
        owners = windows.divide(batches, count)
        loads = [0] * count
        for shape, owner in zip(shapes, owners, strict=True):
            loads[owner] += shape.num_examples * shape.num_tokens
        largest = max(shape.num_examples * shape.num_tokens for shape in shapes)
        assert max(loads) - min(loads) <= largest
        assert owners == windows.divide(batches, count)
    assert windows.divide([], 3) == []


def test_flags_as_text():
    for flags in ([], [True], [False] * 9 + [True], [True, False] * 5000):
        assert windows.decode_flags(windows.encode_flags(flags)) == flags
    assert len(windows.encode_flags([True] * 700_000 + [False] * 300_000)) < 2000


def test_only_the_second_signal_ends_a_batch_in_flight():
    """In a process of its own, with a batch that never ends."""
    script = (
        "import time\nfrom jaxgrad.processes import stopping\nstopping.catch_sigterm()\n"
        "stopping.note_progress(3, 9)\n"
        "with stopping.finishing_batches():\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    finally:
        killer.cancel()
    assert process.returncode == RUN_AGAIN
    assert "stopped by SIGTERM: 3 of 9 examples are done" in stderr
