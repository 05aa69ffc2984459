"""Several real processes share one run on this machine. tests/kill_soak.py is the long form."""

import json
import signal
import socket
import time

import pandas as pd
import pytest
from process_groups import (
    FLAGS,
    Processes,
    digest,
    faults,
    free_port,
    make_inputs,
    start_and_wait,
)

import jaxgrad
from jaxgrad import pipeline
from jaxgrad.runs.agreement import first_difference

NUM_RECORDS, NUM_MATRICES = 530, 1
TIMEOUT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    make_inputs(folder, NUM_RECORDS)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """The digest of the run of one process."""
    given = dict(flag.removeprefix("--").split("=", 1) for flag in FLAGS)
    options = jaxgrad.AnalyzeOptions(
        chat=given["chat"],
        max_length=int(given["max_length"]),
        batch_tokens=int(given["batch_tokens"]),
        parameters=given["parameters"],
    )
    pipeline.run_analysis(
        model_path=str(folder / "model"),
        data_paths=[folder / "data.json"],
        output_dir=folder / "single",
        options=options,
        say=lambda line: None,
        progress=False,
    )
    assert not faults(folder / "single", NUM_RECORDS, NUM_MATRICES)
    return digest(folder / "single")


def num_measured(output_dir):
    """How many examples are in the journal, where each is a batch here, and in parts."""
    parts = (pd.read_parquet(path) for path in (output_dir / "examples").glob("*.parquet"))
    merged = sum(int((part["status"] == "ok").sum()) for part in parts)
    return merged + len(list((output_dir / "journal").iterdir()))


def test_killed_stopped_and_continued_by_other_numbers_of_processes(folder, single):
    output_dir = folder / "shared"
    # A follower dies. Process 0 says so, after the time-out.
    group = start_and_wait(folder, output_dir, 2, 20, timeout=TIMEOUT)
    group.signal(1, signal.SIGKILL)
    struck = time.monotonic()
    leader, follower = group.wait(200)
    assert (leader.code, follower.code) == (69, -signal.SIGKILL), leader.stderr
    assert time.monotonic() - struck < 3 * TIMEOUT + 10
    assert "error: process 1 of 2 has died or cannot be reached; finished batches" in leader.stderr
    assert "run the same command again on all hosts" in leader.stderr
    # Process 0 dies, and JAX's service with it.
    group = start_and_wait(folder, output_dir, 2, 20, timeout=TIMEOUT)
    group.signal(0, signal.SIGKILL)
    leader, follower = group.wait(200)
    assert (leader.code, follower.code) == (-signal.SIGKILL, 69), follower.stderr
    lines = follower.stderr.strip().splitlines()
    assert lines[-1].startswith("error: process 1: process 0 of 2 has died or cannot be reached")
    assert "Check failure stack trace" not in follower.stderr
    # One gets SIGTERM: both finish their batches in flight.
    group = start_and_wait(folder, output_dir, 2, 20, timeout=TIMEOUT)
    group.signal(1, signal.SIGTERM)
    leader, follower = group.wait(200)
    assert (leader.code, follower.code) == (75, 75), (leader.stderr, follower.stderr)
    done = num_measured(output_dir)
    assert f"stopped by SIGTERM: {done} of " in leader.stderr.splitlines()[-1]
    assert follower.stderr.splitlines()[-1].startswith("process 1: stopped by SIGTERM: ")
    # Another number of processes goes on.
    ended = Processes(folder, output_dir, 3, timeout=TIMEOUT).wait(300)
    assert [process.code for process in ended] == [0, 0, 0], [p.stderr for p in ended]
    assert not faults(output_dir, NUM_RECORDS, NUM_MATRICES)
    assert digest(output_dir) == single
    assert [process.stdout for process in ended[1:]] == ["", ""]
    assert "3 processes" in ended[0].stdout
    run = json.loads((output_dir / "run.json").read_text())
    assert len(run["sessions"]) == 4 and run["sessions"][-1]["info"]["processes"] == 3
    work = run["counts"]["processes"]
    # Each example is a batch here, so the shares of the processes differ by one at most.
    assert sum(share["batches"] for share in work) == run["counts"]["ok"] - done
    assert max(s["batches"] for s in work) - min(s["batches"] for s in work) <= 1
    assert run["counts"]["compiled_shapes"] == sum(share["compiled_shapes"] for share in work)


SPANNING = {
    "flags": ("--mesh=2x4", "--limit=60", "--batch_tokens=96"),
    "devices": 4,
    "timeout": TIMEOUT,
}


def test_a_mesh_across_processes_is_stopped_and_continued(folder, single):
    """Two processes of four devices; one gets SIGTERM; the numbers are those of one device."""
    output_dir = folder / "spanned"
    group = start_and_wait(folder, output_dir, 2, 2, **SPANNING)
    group.signal(1, signal.SIGTERM)
    leader, follower = group.wait(200)
    assert (leader.code, follower.code) == (75, 75), (leader.stderr, follower.stderr)
    assert "stopped by SIGTERM: " in leader.stderr.splitlines()[-1]
    assert "mesh 2x4 spans 2 processes" in leader.stdout
    done = len(list((output_dir / "journal").iterdir()))
    assert 2 <= done < 20
    leader, follower = Processes(folder, output_dir, 2, **SPANNING).wait(300)
    assert (leader.code, follower.code) == (0, 0), (leader.stderr, follower.stderr)
    assert not faults(output_dir, 60, NUM_MATRICES)
    run = json.loads((output_dir / "run.json").read_text())
    meshes = [session["info"]["device"]["mesh"] for session in run["sessions"]]
    assert meshes == ["2x4", "2x4"]
    # Each has written a share.
    written = [share["batches"] for share in run["counts"]["processes"]]
    assert sum(written) + done == 20 and max(written) - min(written) <= 1
    found, expected = (
        pd.read_parquet(path / "matrices").set_index("example_index").sort_index()
        for path in (output_dir, folder / "single")
    )
    for column in ("nuclear_norm", "sigma_max", "frobenius_norm", "effective_rank"):
        assert (found[column] / expected[column][found.index] - 1).abs().max() < 1e-5, column


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_process_in_a_collective_ends_when_another_is_gone(folder, struck, how):
    """The one that is left waits for values that never come, or its program fails."""
    output_dir = folder / f"struck-{struck}-{how}"
    group = start_and_wait(folder, output_dir, 2, 2, **SPANNING)
    group.signal(struck, getattr(signal, how))
    began = time.monotonic()
    ended = group.wait(200)
    assert time.monotonic() - began < 3 * TIMEOUT + 10
    left = ended[1 - struck]
    if how == "SIGKILL":
        assert left.code == 69, left.stderr
        assert (
            f"error: {'process 1: ' * (struck == 0)}process {struck} of 2 has died" in left.stderr
        )
    else:
        assert [process.code for process in ended] == [130, 130], [p.stderr for p in ended]
    assert "Traceback" not in left.stderr


def test_an_error_in_one_ends_all_with_its_line(folder):
    """The second process is given another data file."""
    port, output_dir = free_port(), folder / "differs"
    other = folder / "other.json"
    other.write_text(json.dumps(json.loads((folder / "data.json").read_text())[:5]))
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    leader = Processes(folder, output_dir, 1, flags=(*flags, "--process_id=0"))
    follower = Processes(
        folder, output_dir, 1, flags=(*flags, "--process_id=1", f"--data_path={other}")
    )
    (led,), (followed,) = leader.wait(200), follower.wait(200)
    assert (led.code, followed.code) == (2, 2), (led.stderr, followed.stderr)
    assert "error: process 1: data.sha256 is " in followed.stderr
    assert "error: process 1 ended: data.sha256 is " in led.stderr
    assert not output_dir.exists()


def test_a_coordinator_that_is_not_there(folder):
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=1")
    began = time.monotonic()
    (ended,) = Processes(folder, folder / "never", 1, timeout=2, flags=flags).wait(200)
    assert ended.code == 69, ended.stderr
    assert time.monotonic() - began < 60
    assert "process 1 of 2 cannot join the others: nobody answers at 127.0.0.1:" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken(folder):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        flags = (f"--coordinator={where}", "--num_processes=2", "--process_id=0")
        (ended,) = Processes(folder, folder / "never", 1, timeout=2, flags=flags).wait(200)
    assert ended.code == 2, ended.stderr
    assert "process 0 cannot listen on port" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_the_first_difference_is_named():
    there = {"data": {"start": 0, "limit": None}, "window": 256}
    assert first_difference(there, json.loads(json.dumps(there))) is None
    here = {"data": {"start": 0, "limit": 3}, "window": 256}
    assert first_difference(there, here) == ("data.limit", None, 3)
    assert first_difference(there, {"data": 1, "window": 256})[0] == "data"
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
