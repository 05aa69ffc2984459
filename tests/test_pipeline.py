"""The whole pipeline on a tiny model: results, resuming, kills, and what runs must agree on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from result_runs import parts, stored
from tiny_models import Tiny, save_tiny

import jaxgrad
from jaxgrad import pipeline
from jaxgrad.measure import stream
from jaxgrad.measure.programs import Programs
from jaxgrad.runs import plan

ROOT = Path(__file__).resolve().parent.parent
# Few shapes, because each is compiled: 32 tokens with 16 or 32 response positions, 36 with 36.
MAX_LENGTH = 36
OPTIONS = jaxgrad.AnalyzeOptions(max_length=MAX_LENGTH, chat="no", batch_tokens=1)
STATISTICS = ["nuclear_norm", "sigma_max", "frobenius_norm", "effective_rank", "entry_mean"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny(
        Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52), tmp_path_factory.mktemp("model")
    )


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(records(30)))
    return path


def records(count):
    rows = []
    for i in range(count):
        output = " ".join(["so", "it", "is", str(i)][: 1 + i % 4]) * (1 + i % 3)
        rows.append({"instruction": "what " + "a b " * (i % 3), "input": "", "output": output})
    rows[3]["output"] = ""  # empty response
    rows[5]["instruction"] = "word " * 400  # fills max_length
    rows[8]["output"] = "a long answer " * 40  # truncated
    return rows


def run(model_dir, data_path, output_dir, **changes):
    keys = {field.name for field in dataclasses.fields(OPTIONS)}
    options = dataclasses.replace(OPTIONS, **{k: v for k, v in changes.items() if k in keys})
    rest = {k: v for k, v in changes.items() if k not in keys}
    lines = []
    pipeline.run_analysis(
        model_path=str(model_dir),
        data_paths=[data_path],
        output_dir=output_dir,
        options=options,
        say=lines.append,
        progress=False,
        **rest,
    )
    return jaxgrad.read_results(output_dir), lines


def parquet_bytes(output_dir):
    files = sorted(output_dir.rglob("*.parquet"))
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(model_dir, data_path, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    results, lines = run(model_dir, data_path, output_dir)
    return output_dir, results, lines


def test_a_run_records_every_example_with_its_status(undisturbed):
    output_dir, results, lines = undisturbed
    examples = results.examples.set_index("example_index")
    assert list(examples.index) == list(range(30))
    assert examples.loc[3, "reason"] == "empty response"
    assert examples.loc[5, "reason"] == "prompt fills max_length"
    assert examples.loc[8, "truncated"] and examples.loc[8, "status"] == "ok"
    assert (examples["status"] == "skipped").sum() == 2
    assert examples.loc[examples["status"] == "ok", "loss"].notna().all()
    cut = examples["truncated"].sum()
    assert any(f"28 measured, 2 skipped, 0 not finite; {cut} truncated" in line for line in lines)
    assert any(line.startswith("memory: ") for line in lines)
    assert any("batch shapes (at most 12)" in line for line in lines)
    run_json = json.loads((output_dir / "run.json").read_text())
    assert run_json["finished"] and run_json["counts"]["ok"] == 28
    info = run_json["sessions"][0]["info"]
    assert info["device"]["backend"] == "cpu" and info["versions"]["jax"]
    matrices = pd.read_parquet(output_dir / "matrices")
    assert set(matrices["projection"]) == {"q", "k", "v", "o"}
    assert len(matrices) == 28 * 4 * matrices["layer"].nunique()
    assert matrices[["entry_max", "entry_min", "singular_values"]].isna().all().all()
    assert (matrices["effective_rank"] <= matrices["rank_bound"] * (1 + 1e-9)).all()


def test_the_iterator_gives_the_rows_of_the_run(model_dir, data_path, undisturbed):
    model = jaxgrad.load_model(str(model_dir))
    data = jaxgrad.read_examples(data_path)
    results = {r.example_index: r for r in jaxgrad.analyze(model, data.examples, OPTIONS)}
    assert sorted(results) == list(range(30))
    matrices = undisturbed[1].matrices
    for index in (0, 8, 29):
        expected = matrices[matrices["example_index"] == index]
        for name in STATISTICS:
            np.testing.assert_array_equal(results[index].matrices[name], expected[name])


def test_two_runs_and_a_slice_agree_to_the_last_bit(model_dir, data_path, undisturbed, tmp_path):
    again, _ = run(model_dir, data_path, tmp_path / "again")
    pd.testing.assert_frame_equal(again.matrices, undisturbed[1].matrices)
    part, _ = run(model_dir, data_path, tmp_path / "part", start=7, limit=5)
    assert list(part.examples["example_index"]) == [7, 8, 9, 10, 11]
    whole = undisturbed[1].matrices
    expected = whole[whole["example_index"].between(7, 11)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part.matrices, expected)


def test_batches_of_several_examples_give_the_same_statistics(
    model_dir, data_path, undisturbed, tmp_path
):
    batched, _ = run(model_dir, data_path, tmp_path / "batched", batch_tokens=100)
    alone = undisturbed[1].matrices
    for name in set(STATISTICS) - {"entry_mean"}:
        np.testing.assert_allclose(batched.matrices[name], alone[name], rtol=2e-5)
    # A mean cancels, so it is held to the size of the entries.
    size = alone["frobenius_norm"] / np.sqrt(alone["rows"] * alone["cols"])
    difference = (batched.matrices["entry_mean"] - alone["entry_mean"]).abs()
    assert (difference < 1e-5 * size).all()
    np.testing.assert_array_equal(
        batched.matrices["rank_bound"], undisturbed[1].matrices["rank_bound"]
    )


def test_spectrum_and_extremes_when_asked(model_dir, data_path, tmp_path):
    results, _ = run(
        model_dir,
        data_path,
        tmp_path / "r",
        spectrum=True,
        extremes=True,
        limit=2,  # of one shape
        parameters="all",
    )
    matrices = results.matrices
    assert {"gate", "up", "down"} < set(matrices["projection"])
    for row in matrices.itertuples():
        np.testing.assert_allclose(np.sum(row.singular_values), row.nuclear_norm, rtol=1e-12)
        assert len(row.singular_values) == row.rank_bound
        assert row.entry_min <= row.entry_mean <= row.entry_max


def test_selecting_layers_by_expression(model_dir, data_path, undisturbed, tmp_path):
    results, _ = run(
        model_dir, data_path, tmp_path / "r", limit=2, parameters=r"layers\.1\.self_attn\.[qo]_"
    )
    assert set(zip(results.matrices["layer"], results.matrices["projection"], strict=True)) == {
        (1, "q"),
        (1, "o"),
    }
    whole = undisturbed[1].matrices
    expected = whole[
        (whole["example_index"] < 2) & (whole["layer"] == 1) & whole["projection"].isin(["q", "o"])
    ]
    np.testing.assert_array_equal(results.matrices["nuclear_norm"], expected["nuclear_norm"])


def test_authors_jsonl(model_dir, data_path, tmp_path):
    output_dir = tmp_path / "r"
    results, _ = run(model_dir, data_path, output_dir, limit=2, output_format="jsonl")
    lines = (output_dir / "authors.jsonl").read_text().splitlines()
    assert len(lines) == 2
    record = json.loads(lines[0])
    assert list(record)[:3] == ["instruction", "output", "loss"]
    entry = record["model.layers.0.self_attn.q_proj.weight"]
    first = results.matrices.iloc[0]
    assert entry["S_sum"] == first["nuclear_norm"] and entry["M_max"] == first["entry_max"]


def test_in_an_object_store_and_mended(model_dir, data_path, tmp_path):
    """The same files under a URL; and a finished run with a damaged part is measured again there."""
    changes = {"limit": 2, "output_format": "jsonl"}
    run(model_dir, data_path, tmp_path / "r", **changes)
    _, lines = run(model_dir, data_path, "memory://pipeline/r", **changes)
    assert "authors' JSONL: memory://pipeline/r/authors.jsonl (2 lines)" in lines
    calm = parts(tmp_path / "r")
    assert stored("memory://pipeline/r") == calm
    file = tmp_path / "r/examples/part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    _, lines = run(model_dir, data_path, tmp_path / "r", **changes)
    assert not [line for line in lines if "nothing to compute" in line]
    damaged = "damaged/examples-part-00000.parquet.1"
    assert parts(tmp_path / "r") == calm | {damaged: calm["examples/part-00000.parquet"][:-1]}
    _, lines = run(model_dir, data_path, tmp_path / "r", **changes)
    assert [line for line in lines if "nothing to compute" in line]


@pytest.mark.parametrize("window", [7, 256])
def test_interrupted_at_any_batch_and_continued(
    model_dir, data_path, undisturbed, tmp_path, monkeypatch, window
):
    """Same bytes as undisturbed, and no batch but the one in flight is computed twice."""
    monkeypatch.setattr(plan, "WINDOW", window)
    # Of two in flight the second would be computed twice, and which one it is would be chance.
    monkeypatch.setattr(stream, "batches_in_flight", lambda _: 1)
    calm = tmp_path / "calm"
    run(model_dir, data_path, calm)
    original, calls = Programs.measure, []
    stop_at = iter([1, 2, 9, 17, 4, 10**9])
    output_dir = tmp_path / "interrupted"
    interruptions = 0
    while True:
        budget = next(stop_at)

        def measure(self, state, shape, arrays, budget=budget, started=len(calls)):
            if len(calls) - started >= budget:
                raise KeyboardInterrupt
            calls.append(arrays.tokens_T.tobytes() + arrays.labels_S.tobytes())
            return original(self, state, shape, arrays)

        monkeypatch.setattr(Programs, "measure", measure)
        try:
            run(model_dir, data_path, output_dir)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 3
    assert len(calls) == 28  # one example a batch, each computed once
    assert parquet_bytes(output_dir) == parquet_bytes(calm)
    if window == 256:
        assert parquet_bytes(calm) == parquet_bytes(undisturbed[0])


def start_analyze(model_dir, data_path, output_dir):
    command = [sys.executable, str(ROOT / "bin" / "analyze"), f"--model_path={model_dir}"]
    command += [f"--data_path={data_path}", f"--output_dir={output_dir}", "--chat=no"]
    return subprocess.Popen(
        [*command, f"--max_length={MAX_LENGTH}", "--batch_tokens=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def interruptible():
    """Children obey SIGINT, also where a shell started the tests in the background, ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# SIGTERM has a file of its own, test_stopping.
SLOW_SIGTERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, SLOW_SIGTERM])
def test_killed_in_the_middle_and_started_again(model_dir, tmp_path, how, interruptible):
    data_path = tmp_path / "data.json"
    data_path.write_text(json.dumps(records(250)))
    calm, output_dir = tmp_path / "calm", tmp_path / "killed"
    run(model_dir, data_path, calm)
    process = start_analyze(model_dir, data_path, output_dir)
    journal, deadline = output_dir / "journal", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.is_dir() and len(os.listdir(journal)) > 20:
            process.send_signal(how)
            break
        time.sleep(0.001)
    _, stderr = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert "interrupted" in stderr and "Traceback" not in stderr
    if how == signal.SIGTERM:
        assert process.returncode == 75, stderr
        done = len(os.listdir(journal))
        assert f"stopped by SIGTERM: {done} of 248 examples are done" in stderr
    assert not json.loads((output_dir / "run.json").read_text())["finished"]
    with pytest.raises(jaxgrad.UserError, match="analyze"):
        jaxgrad.read_results(output_dir)
    again = start_analyze(model_dir, data_path, output_dir)
    stdout, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert parquet_bytes(output_dir) == parquet_bytes(calm)
    third = start_analyze(model_dir, data_path, output_dir)
    stdout, _ = third.communicate(timeout=120)
    assert third.returncode == 0 and "nothing to compute" in stdout


def test_several_files_share_one_model_and_its_programs(model_dir, undisturbed, tmp_path):
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, rows in zip(paths, (records(30), records(30)[:12]), strict=True):
        path.write_text(json.dumps(rows))
    lines = []
    summaries = pipeline.run_analysis(
        model_path=str(model_dir),
        data_paths=paths,
        output_dir=tmp_path / "runs",
        options=OPTIONS,
        say=lines.append,
        progress=False,
    )
    assert [Path(summary.output_dir).name for summary in summaries] == ["first", "second"]
    assert summaries[1].counts["compiled_shapes"] == 0
    first = jaxgrad.read_results(tmp_path / "runs" / "first")
    pd.testing.assert_frame_equal(first.matrices, undisturbed[1].matrices)
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "first.json").write_text("[]")
    with pytest.raises(jaxgrad.UserError, match="same name"):
        pipeline.run_analysis(
            model_path=str(model_dir), data_paths=[paths[0], again / "first.json"], output_dir="x"
        )


def test_another_configuration_is_refused_with_the_difference(model_dir, data_path, undisturbed):
    with pytest.raises(jaxgrad.UserError, match=r"method.*auto.*dense"):
        run(model_dir, data_path, undisturbed[0], method="dense")


def test_a_gradient_that_is_not_finite_is_named_and_the_run_goes_on(data_path, tmp_path):
    """Weights that overflow for one token only: its example is recorded, the others are measured."""
    directory = save_tiny(
        Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52), tmp_path / "model"
    )
    from safetensors.numpy import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    model = jaxgrad.load_model(str(directory))
    token = model.tokenizer.encode("0", add_special_tokens=False)[-1]
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a 0", "output": "b"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    results, lines = run(directory, data, tmp_path / "r")
    examples = results.examples
    assert examples["status"].tolist() == ["ok", "non_finite"]
    assert examples["reason"][1] == (
        "loss is nan; first not finite in the forward pass at the input of "
        "model.layers.0.self_attn.q_proj.weight, first among the measured weights"
    )
    assert set(results.matrices["example_index"]) == {0}
    assert any("1 not finite" in line for line in lines)
