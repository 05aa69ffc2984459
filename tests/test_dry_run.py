"""Before a run: the dry run, batches chosen by memory, and what a continued run keeps."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_models import Tiny, save_tiny

import jaxgrad
from jaxgrad import pipeline
from jaxgrad.checkpoints import Checkpoint, open_checkpoint
from jaxgrad.data.batches import BatchShape
from jaxgrad.measure import memory
from jaxgrad.measure import programs as program
from jaxgrad.runs import plan as planning

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = jaxgrad.AnalyzeOptions(max_length=48, chat="no", parameters="q_proj")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tiny = Tiny(num_heads=4, num_kv_heads=2, tied=True, width=52)
    return save_tiny(tiny, tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_path(tmp_path):
    rows = [{"instruction": "what", "output": "so it is"[: 2 + i]} for i in range(6)]
    rows[2]["output"] = ""
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def plan(model_dir, data_path, **changes):
    lines = []
    asked = {"model_path": str(model_dir), "data_paths": [data_path], "options": OPTIONS}
    (found,) = jaxgrad.dry_run(**(asked | changes), say=lines.append)
    return found, lines


def run(model_dir, data_path, output_dir, **changes):
    lines = []
    pipeline.run_analysis(
        model_path=str(model_dir),
        data_paths=[data_path],
        output_dir=output_dir,
        options=dataclasses.replace(OPTIONS, **changes),
        say=lines.append,
        progress=False,
    )
    return json.loads((output_dir / "run.json").read_text()), lines


def test_a_dry_run_plans_without_weights_and_writes_nothing(
    model_dir, data_path, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("a dry run loads no weights and compiles nothing")

    monkeypatch.setattr(Checkpoint, "load", refuse)
    monkeypatch.setattr(program.Programs, "compiled", refuse)
    before = sorted(tmp_path.rglob("*"))
    found, lines = plan(model_dir, data_path, output_dir=tmp_path / "none")
    assert sorted(tmp_path.rglob("*")) == before
    assert (len(found.plan.tokenized), len(found.plan.measurable)) == (6, 5)
    assert found.plan.num_matrices == 3  # q of three layers
    # One batch holds all five.
    assert sum(found.plan.shapes.values()) == 1 and found.seconds is None
    assert found.plan.memory.total == found.plan.choice.needed
    text = "\n".join(lines)
    assert re.search(r"^memory: .* disk: ", text, re.MULTILINE)
    assert "15 in all" in text and "1 skipped" in text


def test_the_command_needs_no_output_directory(model_dir, data_path):
    command = [sys.executable, str(ROOT / "bin" / "analyze"), f"--model_path={model_dir}"]
    command += [f"--data_path={data_path}", "--chat=no", "--max_length=48"]
    done = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout
    done = subprocess.run([*command, "--calibrate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--dry_run" in done.stderr


def test_a_calibration_estimates_the_time(model_dir, data_path):
    found, lines = plan(model_dir, data_path, calibrate=True)
    assert found.seconds > 0
    assert any(line.startswith("time: about") for line in lines)


def test_a_continued_run_keeps_the_number_that_was_chosen(
    model_dir, data_path, tmp_path, monkeypatch
):
    monkeypatch.setitem(memory.DEFAULT_BATCH_TOKENS, "cpu", 128)
    config = open_checkpoint(str(model_dir)).config
    alone, four = (
        memory.predict_memory(
            config, "float32", planning.settings_for(OPTIONS, config), BatchShape(B, 32, 16)
        ).total
        for B in (1, 4)
    )
    monkeypatch.setattr(planning, "memory_at_hand", lambda: int((alone + four) / 2 / 0.9))
    original, calls = program.Programs.measure, []

    def interrupted(self, state, shape, arrays):
        if calls:
            raise KeyboardInterrupt
        calls.append(shape)
        return original(self, state, shape, arrays)

    monkeypatch.setattr(program.Programs, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, data_path, tmp_path / "r")
    recorded = json.loads((tmp_path / "r" / "run.json").read_text())
    chosen = recorded["identity"]["options"]["batch_tokens"]
    assert chosen in (32, 64) and calls[0].num_examples == chosen // 32
    # On another day there is more memory.
    monkeypatch.setattr(program.Programs, "measure", original)
    monkeypatch.setattr(planning, "memory_at_hand", lambda: 10**12)
    assert (
        plan(model_dir, data_path, output_dir=tmp_path / "r")[0].plan.choice.batch_tokens == chosen
    )
    ended, _ = run(model_dir, data_path, tmp_path / "r")
    assert ended["finished"] and ended["identity"]["options"]["batch_tokens"] == chosen
    with pytest.raises(jaxgrad.UserError, match="batch_tokens"):
        run(model_dir, data_path, tmp_path / "r", batch_tokens=128)


def test_what_does_not_fit_is_a_warning_on_a_cpu_and_an_error_on_a_device(
    model_dir, data_path, monkeypatch
):
    monkeypatch.setattr(planning, "memory_at_hand", lambda: 1000)
    _, lines = plan(model_dir, data_path)
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "needs about" in warning and "0.00 MB are at hand" in warning
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(jaxgrad.UserError, match="one example needs about"):
        plan(model_dir, data_path)


def test_a_run_says_and_records_that_batches_were_halved(
    model_dir, data_path, tmp_path, monkeypatch
):
    original = program.Programs.compiled

    def compiled(self, shape):
        if shape.num_examples > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return original(self, shape)

    monkeypatch.setattr(program.Programs, "memory", lambda self, shape: fake_account(shape))
    monkeypatch.setattr(program.Programs, "compiled", compiled)
    ended, lines = run(model_dir, data_path, tmp_path / "r", batch_tokens=64)
    assert ended["counts"]["ok"] == 5
    assert ended["counts"]["halved_shapes"] == {"2 x 32 x 16": 1}
    said = [line for line in lines if line.startswith("out of memory")]
    assert said == ["out of memory: batches of 2 x 32 tokens are measured as 1 x 32"]


def fake_account(shape):
    return program.CompiledMemory(weights=1, work_space=1, shape=shape)


def test_without_max_length_a_small_models_positions_are_the_limit(model_dir, data_path):
    """The tiny model has 257 positions."""
    changes = {"max_length": None}
    found, lines = plan(model_dir, data_path, options=dataclasses.replace(OPTIONS, **changes))
    assert found.plan.options.max_length == 257
    assert any("at most 257 tokens" in line for line in lines)


def test_max_length_is_1024_where_the_model_has_more_positions():
    assert OPTIONS.fitted_to(257).max_length == 48
    assert dataclasses.replace(OPTIONS, max_length=None).fitted_to(2048).max_length == 1024


def test_a_run_records_the_max_length_that_the_model_gave(model_dir, data_path, tmp_path):
    recorded, lines = run(model_dir, data_path, tmp_path / "out", max_length=None)
    assert recorded["identity"]["options"]["max_length"] == 257
    assert any("at most 257 tokens" in line for line in lines)
    _, lines = run(model_dir, data_path, tmp_path / "out", max_length=None)
    assert any("nothing to compute" in line for line in lines)
    _, lines = run(model_dir, data_path, tmp_path / "out", max_length=257)
    assert any("nothing to compute" in line for line in lines)
