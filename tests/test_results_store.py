"""The run directory: schema, resume, refusals, and a kill at every step."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from result_runs import (
    COUNTS,
    IDENTITY,
    INFO,
    PLAN,
    Killed,
    complete,
    measured,
    parts,
    skipped,
)

from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results import (
    EXAMPLES_SCHEMA,
    MATRICES_SCHEMA,
    ExampleResult,
    RunDirectory,
    examples_table,
    iter_results,
    matrices_table,
    read_results,
)
from jaxgrad.results.files import temporary_path
from jaxgrad.runs.asked import asked_identity


def test_schemas_are_the_public_interface():
    assert {field.name: str(field.type) for field in EXAMPLES_SCHEMA} == {
        "example_index": "int64", "example_id": "string", "num_tokens": "int32",
        "num_prompt_tokens": "int32", "num_response_tokens": "int32", "truncated": "bool",
        "loss": "double", "status": "string", "reason": "string", "instruction": "string",
        "response": "string",
    }  # fmt: skip
    assert {field.name: str(field.type) for field in MATRICES_SCHEMA} == {
        "example_index": "int64", "layer": "int32", "projection": "string", "expert": "int32",
        "part": "string", "rows": "int32", "cols": "int32", "nuclear_norm": "double",
        "sigma_max": "double", "sigma_min": "double", "frobenius_norm": "double",
        "entry_mean": "double", "entry_max": "double", "entry_min": "double",
        "effective_rank": "double", "stable_rank": "double", "condition_number": "double",
        "rank_bound": "int32",
        "singular_values": "list<element: double>", "partner_cosine": "double",
        "layer_cosines": "list<element: double>",
    }  # fmt: skip


def test_tables_of_results():
    examples = examples_table([measured(3), skipped(4)]).to_pylist()
    assert examples[0]["loss"] == 4.5 and examples[1]["loss"] is None
    assert [row["status"] for row in examples] == ["ok", "skipped"]
    table = matrices_table([measured(3), skipped(4)])
    assert table.schema == MATRICES_SCHEMA
    rows = table.to_pylist()
    assert [row["layer"] for row in rows] == [1, 0, None]
    assert [row["projection"] for row in rows] == ["q", "o", "lm_head"]
    assert [row["effective_rank"] for row in rows] == [2.5, None, 1.0]  # undefined: null
    assert np.isnan(rows[0]["entry_mean"])  # measured as NaN: stays
    assert all(row["sigma_max"] is None for row in rows)  # absent
    assert [len(row["singular_values"]) for row in rows] == [3, 3, 2]


def test_matrices_that_do_not_fit_raise():
    for matrices, message in (
        ({"layer": [0], "projection": ["q"], "sigma": [1.0]}, "no such column: sigma"),
        ({"layer": [0], "projection": ["q"], "rows": [1, 2]}, "rows has 2 rows"),
        ({"projection": ["q"]}, "layer and projection"),
    ):
        row = ExampleResult(0, "0", 2, 1, 1, False, 0.0, "ok", None, "", "", matrices)
        with pytest.raises(ValueError, match=message):
            matrices_table([row])


def test_a_broken_character_does_not_end_a_run():
    row = ExampleResult(0, "0", 2, 1, 1, False, 0.0, "ok", None, "a\ud800b", "é")
    assert examples_table([row]).column("instruction").to_pylist() == ["a?b"]


def test_a_whole_run_on_disk(undisturbed):
    names = {"examples/part-00000.parquet", "examples/part-00001.parquet"}
    names |= {name.replace("examples", "matrices") for name in names}
    checksums = {f"checksums/window-0000{window}.json" for window in PLAN}
    assert set(parts(undisturbed)) == names | checksums
    assert sorted(os.listdir(undisturbed)) == ["checksums", "examples", "matrices", "run.json"]
    for window in PLAN:
        told = json.loads((undisturbed / f"checksums/window-0000{window}.json").read_text())
        for table in ("examples", "matrices"):
            part = (undisturbed / f"{table}/part-0000{window}.parquet").read_bytes()
            assert told[table] == hashlib.sha256(part).hexdigest()
    for name in names:
        schema = EXAMPLES_SCHEMA if name.startswith("examples") else MATRICES_SCHEMA
        assert pq.read_schema(undisturbed / name) == schema
    examples = pd.read_parquet(f"{undisturbed}/examples")
    assert examples["example_index"].tolist() == list(range(13))
    assert examples.loc[examples["status"] == "skipped", "example_index"].tolist() == [2, 12]
    matrices = pd.read_parquet(f"{undisturbed}/matrices")
    assert matrices["example_index"].tolist() == [i for i in range(12) if i != 2 for _ in range(3)]
    assert matrices["projection"].tolist() == ["q", "o", "lm_head"] * 11
    run = json.loads((undisturbed / "run.json").read_text())
    assert run["finished"] and run["identity"] == IDENTITY and run["counts"] == COUNTS
    assert [session["info"] for session in run["sessions"]] == [INFO]
    assert run["windows"] == 2 and run["finished_at"]


def test_results_read_back(undisturbed):
    results = read_results(undisturbed)
    assert results.run["counts"] == COUNTS
    assert str(results.examples["num_tokens"].dtype) == "Int32"
    assert str(results.examples["truncated"].dtype) == "boolean"
    assert str(results.matrices["layer"].dtype) == "Int32"
    assert str(results.matrices["nuclear_norm"].dtype) == "float64"
    five = results.matrices[results.matrices["example_index"] == 5]
    spectrum = measured(5).matrices["singular_values"][0]
    assert five["nuclear_norm"].tolist() == [float(np.float32(spectrum.sum()))] * 3
    np.testing.assert_array_equal(five["singular_values"].iloc[0], spectrum)
    windows = list(iter_results(undisturbed))
    assert [len(part.examples) for part in windows] == [7, 6]
    matrices = pd.concat([part.matrices for part in windows], ignore_index=True)
    pd.testing.assert_frame_equal(matrices, results.matrices)


def test_a_finished_run_is_not_touched(undisturbed):
    def times():
        return {file: file.stat().st_mtime_ns for file in [undisturbed, *undisturbed.rglob("*")]}

    before = times()
    run = RunDirectory.open(undisturbed, IDENTITY, {"version": "9"})
    assert run.finished and run.window_done(1)
    RunDirectory.probe(undisturbed)
    for write in (lambda: run.write_batch(1, 0, []), lambda: run.finish({})):
        with pytest.raises(ValueError, match="finished"):
            write()
    assert times() == before


def test_a_continued_run_computes_no_batch_twice(tmp_path, undisturbed):
    path = tmp_path / "run"
    run = RunDirectory.open(path, IDENTITY, INFO)
    run.write_batch(0, 1, [measured(1), measured(6)])
    with pytest.raises(ValueError, match="before every window"):
        run.finish({})
    computed: list[int] = []
    complete(path, computed)
    assert sorted(computed) == [0, 3, 4, 5, 7, 8, 9, 10, 11]
    assert parts(path) == parts(undisturbed)
    assert len(read_results(path).run["sessions"]) == 2


def test_finish_window_checks_its_examples(tmp_path):
    run = RunDirectory.open(tmp_path, IDENTITY, INFO)
    run.write_batch(0, 0, [measured(0)])
    with pytest.raises(ValueError, match="twice"):
        run.finish_window(0, [skipped(0)])
    with pytest.raises(ValueError, match="2 examples, not 3"):
        run.finish_window(0, [skipped(1)], num_examples=3)
    assert not run.window_done(0) and run.journaled_batches() == {(0, 0)}
    run.finish_window(0, [skipped(1)], num_examples=2)
    assert run.window_done(0) and not list((tmp_path / "journal").iterdir())


def test_a_batch_that_another_process_recorded_before(tmp_path, undisturbed):
    """A killed session may live on for a while on another host: it writes what we write."""
    ours = RunDirectory.open(tmp_path / "run", IDENTITY, INFO)
    zombie = RunDirectory.open(tmp_path / "run", IDENTITY, INFO, leads=False)
    for number, batch in enumerate(PLAN[0]):
        rows = [measured(index) for index in batch]
        for run in (zombie, ours):
            run.write_batch(0, number, rows)
    ours.finish_window(0, [skipped(2)], num_examples=7)
    zombie.write_batch(0, 2, [measured(4)])
    assert not os.listdir(tmp_path / "run/journal")
    # It looked whether the window is done just before it was.
    zombie.window_done = lambda window: False
    zombie.write_batch(0, 2, [measured(4)])
    for number, batch in enumerate(PLAN[1]):
        ours.write_batch(1, number, [measured(index) for index in batch])
    with pytest.raises(ValueError, match="before every window"):
        ours.finish({})
    ours.finish_window(1, [skipped(12)], num_examples=6)
    ours.finish(COUNTS)
    assert parts(tmp_path / "run") == parts(undisturbed)


def test_a_run_without_examples(tmp_path):
    run = RunDirectory.open(tmp_path, IDENTITY, INFO)
    run.finish({"measured": 0})
    results = read_results(tmp_path)
    assert len(results.examples) == len(results.matrices) == 0
    assert list(results.matrices) == MATRICES_SCHEMA.names


def test_another_identity_is_refused_by_name(tmp_path):
    RunDirectory.open(tmp_path, IDENTITY, INFO).close()
    other = {**IDENTITY, "model": {"hash": "cd34", "dtype": "float32"}, "limit": 3}
    with pytest.raises(UserError) as refusal:
        RunDirectory.open(tmp_path, other, INFO)
    message = str(refusal.value)
    assert "limit is absent there, 3 here" in message
    assert 'model.hash is "ab12" there, "cd34" here' in message
    assert "dtype" not in message and "more" not in message and "--output_dir" in message
    many = {"window": 7, **{f"flag{i}": i for i in range(4)}}
    with pytest.raises(UserError, match=r"flag0.*flag1.*flag2.*; and 4 more"):
        RunDirectory.open(tmp_path, many, INFO)
    with pytest.raises(UserError, match=r"window is 7 there, 7\.0 here"):  # equal in Python
        RunDirectory.open(tmp_path, {**IDENTITY, "window": 7.0}, INFO)
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1


def test_a_run_of_another_loss_is_refused(tmp_path):
    """A run.json without options.loss is of response_mean, as those of earlier versions are."""
    mean, total = AnalyzeOptions(), AnalyzeOptions(loss="response_sum")
    for there, here in ((mean, total), (total, mean)):
        path = tmp_path / there.loss
        identity = IDENTITY | asked_identity(there, 0, None)
        assert ("loss" in identity["options"]) == (there is total)
        RunDirectory.open(path, identity, INFO).close()
        other = asked_identity(here, 0, None)
        told = f'options.loss is "{there.loss}" there, "{here.loss}" here. Give'
        for attempt in (
            lambda: RunDirectory.check_compatible(path, other),  # noqa: B023
            lambda: RunDirectory.open(path, IDENTITY | other, INFO),  # noqa: B023
        ):
            with pytest.raises(UserError, match=told):
                attempt()
        # What is not asked is not compared.
        RunDirectory.check_compatible(path, {"protocol": "paper"})
        RunDirectory.check_compatible(path, asked_identity(there, 0, None))
        RunDirectory.open(path, identity, INFO).close()


def test_the_early_check_compares_what_both_have(tmp_path):
    path = tmp_path / "run"
    RunDirectory.check_compatible(path, {"protocol": "clean"})
    assert not path.exists()
    RunDirectory.open(path, IDENTITY, INFO).close()
    before = (path / "run.json").read_bytes()
    RunDirectory.check_compatible(path, {"protocol": "paper", "new": 1})
    with pytest.raises(UserError, match='protocol is "paper" there, "clean" here'):
        RunDirectory.check_compatible(path, {"protocol": "clean", "new": 1})
    assert (path / "run.json").read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"no run.*thesis\.txt"):
        RunDirectory.open(tmp_path, IDENTITY, INFO)
    with pytest.raises(UserError, match=r"no run.*thesis\.txt"):
        RunDirectory.check_compatible(tmp_path, {})
    with pytest.raises(UserError, match=r"no run\.json"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        read_results(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["thesis.txt"]


OTHER_FORMAT = {"format": 9, "finished": False, "identity": {}, "sessions": [], "counts": {}}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"finished": true}', json.dumps(OTHER_FORMAT)])
def test_a_damaged_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for attempt in (
        lambda: RunDirectory.open(tmp_path, IDENTITY, INFO),
        lambda: RunDirectory.check_compatible(tmp_path, {}),
        lambda: read_results(tmp_path),
    ):
        with pytest.raises(UserError, match=r"run\.json (is damaged|is not a run's|has format 9)"):
            attempt()


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file/below", Path("/proc/self/run")):
        with pytest.raises(UserError, match="Cannot write"):
            RunDirectory.probe(directory)
        with pytest.raises(UserError, match="Cannot write"):
            RunDirectory.open(directory, IDENTITY, INFO)
    RunDirectory.probe(tmp_path / "a/b/c")
    assert os.listdir(tmp_path) == ["file"]


def test_another_process_is_kept_out(tmp_path):
    code = (
        "import sys; from jaxgrad.results import RunDirectory\n"
        "RunDirectory.open(sys.argv[1], {'a': 1}, {}); print('open', flush=True); input()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=-1, stdout=-1, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="Another process is writing"):
            RunDirectory.open(tmp_path, {"a": 1}, {})
        other.kill()
    RunDirectory.open(tmp_path, {"a": 1}, {}).close()


def test_a_torn_batch_is_computed_again(tmp_path, undisturbed, caplog):
    path = tmp_path / "run"
    run = RunDirectory.open(path, IDENTITY, INFO)
    for number, batch in enumerate(PLAN[0]):
        run.write_batch(0, number, [measured(index) for index in batch])
    files = sorted((path / "journal").iterdir())
    # Cut where Arrow itself sees no damage: its end mark alone is missing.
    files[0].write_bytes(files[0].read_bytes()[:-8])
    files[1].write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        run.finish_window(0)
    with pytest.raises(UserError, match="damaged"):
        read_results(path, allow_unfinished=True)
    computed: list[int] = []
    complete(path, computed)
    for record, number in zip(caplog.records, (0, 1), strict=True):
        assert f"batch {number} is computed again" in record.getMessage()
        assert f"damaged/journal-window-00000-batch-0000{number}.batch.1" in record.getMessage()
    assert sorted(computed) == [0, 1, 3, 5, 6, 7, 8, 9, 10, 11]
    damaged = {name for name in parts(path) if name.startswith("damaged/")}
    assert len(damaged) == 2
    assert {name: data for name, data in parts(path).items() if name not in damaged} == parts(
        undisturbed
    )


def test_a_folder_named_like_a_partition(tmp_path):
    path = tmp_path / "lr=3"
    complete(path)
    assert list(read_results(path).examples) == EXAMPLES_SCHEMA.names


def test_a_full_disk_loses_nothing(tmp_path, undisturbed):
    path = tmp_path / "run"
    run = RunDirectory.open(path, IDENTITY, INFO)
    run.write_batch(0, 0, [measured(index) for index in PLAN[0][0]])
    # The next file's temporary is a device that is always full: the writes fail for real.
    temporary_path(path / "journal/window-00000-batch-00001.batch").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk is full.*Nothing written before is lost.*same"):
        run.write_batch(0, 1, [measured(index) for index in PLAN[0][1]])
    assert run.journaled_batches() == {(0, 0)} and len(os.listdir(path / "journal")) == 1
    computed: list[int] = []
    complete(path, computed)
    assert 5 not in computed and 1 in computed
    assert parts(path) == parts(undisturbed)


STEPS = ("replace", "fsync", "unlink", "mkdir", "rmdir")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_kill_or_a_full_disk_at_every_step(
    tmp_path, monkeypatch, request, undisturbed, kind, step, after
):
    """The k-th call of a step ends the run, for every k; a second run completes it."""
    if step != "fsync":
        request.getfixturevalue("unsynced")
    want, real = parts(undisturbed), getattr(os, step)
    for k in range(1000):
        path, calls = tmp_path / f"{k}", 0

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls != k + 1:  # noqa: B023
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            elif step == "fsync" and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)  # what was not flushed
            if kind == "kill":
                raise Killed
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, step, failing)
        computed: list[int] = []
        try:
            complete(path, computed)
        except Killed:
            assert kind == "kill"
        except UserError as error:
            assert kind == "full" and "disk is full" in str(error)
        monkeypatch.undo()
        if calls <= k:
            break
        complete(path, computed)
        assert parts(path) == want
        assert sorted(os.listdir(path)) == ["checksums", "examples", "matrices", "run.json"]
        run = read_results(path).run
        assert (run["identity"], run["counts"], run["windows"]) == (IDENTITY, COUNTS, 2)
        # Only the batch in flight is computed again, and `computed` has it after it is recorded.
        assert len(computed) == len(set(computed))
    assert k >= {"replace": 13, "fsync": 26, "unlink": 5, "mkdir": 5, "rmdir": 1}[step]
