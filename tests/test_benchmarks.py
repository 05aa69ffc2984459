"""The benchmarks run, end in a line of JSON, and know the published shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import tiny_models

from jaxgrad.models.decoder import num_parameters
from jaxgrad.models.families import read_config
from jaxgrad.spectra import Algorithm

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_file() and "." not in p.name)


def start(name, *flags):
    # Warnings of other packages do not matter here; strict promotion is for our own tests.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    # With more threads than free cores, PyTorch's threads spin while they wait for each other.
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / name), *flags]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1]), out


def refused(process):
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The last line and the whole output of each benchmark; all run at once, as most of it is imports."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_models.save_tiny(tiny_models.ZOO["mha_untied"], folder / "model")
    # All of one length, so that each program is compiled once.
    records = [{"instruction": f"return {k}", "output": " text"} for k in range(3)]
    data = folder / "records.json"
    data.write_text(json.dumps(records), "utf-8")
    flags = {
        "end_to_end": ["--shapes=SmolLM2-135M", "--layers=1", "--tokens=32", "--responses=16",
                       "--limit=2", "--reference_limit=1"],
        "overhead": [f"--model_path={model}", f"--data_path={data}", "--in_flight=2"],
        "spectra": ["--models=SmolLM2-135M", "--tokens=33", "--algorithms=qr"],
    }  # fmt: skip
    processes = {name: start(name, "--repeats=1", *given) for name, given in flags.items()}
    try:
        return {name: finish(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


def check_line(line, name):
    assert line["benchmark"] == name and line["backend"] == "cpu" and line["cores"] >= 1
    assert {"jax", "jaxlib", "torch", "numpy"} == set(line["versions"])
    assert {"commit", "device", "results"} <= set(line)
    for row in line["results"]:
        assert row["ratios"] and all(ratio > 0 for ratio in row["ratios"].values())


@pytest.mark.slow
def test_end_to_end_on_random_models_and_its_figure(outputs, tmp_path):
    line, out = outputs["end_to_end"]
    check_line(line, "end_to_end")
    (row,) = line["results"]
    assert (row["examples"], row["reference_examples"], row["tokens"]) == (2, 1, 32)
    assert set(row["ratios"]) == {"svdvals", "svd"}
    # Both sides hold the same random weights.
    assert max(row["largest_difference"].values()) < 1e-3
    assert row["compiled_shapes"] == 1 and row["compile_seconds"] > 0
    same = row["seconds"]["jaxgrad, same records"][0]
    assert row["ratios"]["svd"] == pytest.approx(row["seconds"]["svd"][0] / same, rel=2e-3)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(out, "utf-8")
    figure = tmp_path / "speed.svg"
    process = start("plot_end_to_end", f"--lines={lines}", f"--figure={figure}", "--tokens=32")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "SmolLM2-135M" in figure.read_text("utf-8")


@pytest.mark.slow
def test_overhead(outputs):
    line, _ = outputs["overhead"]
    check_line(line, "overhead")
    (row,) = line["results"]
    assert set(row["ratios"]) == {
        "measure/taps", "measure/weights", "measure/torch", "taps/torch",
    }  # fmt: skip
    assert row["examples"] == 3 and set(row["compile_seconds"]) == {"measure", "taps", "weights"}


@pytest.mark.slow
def test_spectra(outputs):
    line, out = outputs["spectra"]
    check_line(line, "spectra")
    (row,) = line["results"]
    assert set(row["chosen"]) == {"q", "k", "v", "o"}
    assert row["shapes"]["k"] == [192, 576]
    assert set(row["chosen"].values()) <= set(get_args(Algorithm))
    for way in ("(chosen)", "qr"):
        errors = row["errors"][way]
        assert errors["nuclear_norm"] < 1e-5 and errors["sigma_max"] < 1e-5, (way, errors)
        assert errors["effective_rank"] < 1e-4
        assert row["ratios"][way] > 0
    assert "(chosen)" in out


def test_bad_flags_are_refused_in_one_line():
    processes = {
        "--data_path": start("end_to_end", "--repeats=1"),
        "no-such-model": start("overhead", "--shapes=no-such-model"),
        "--tokens=x": start("spectra", "--tokens=x"),
        "--repeats=0": start("spectra", "--repeats=0"),
        "--meshes": start("sharded_memory", "--meshes=1x1,auto"),
        "--lines": start("plot_end_to_end", f"--figure={ROOT / 'x.svg'}"),
    }
    for expected, process in processes.items():
        error = refused(process)
        assert expected in error or "repeats" in error, error


def test_help_says_what_each_does():
    for name, process in [(name, start(name, "--help")) for name in NAMES]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.startswith(f"usage: {name}")


def test_the_shapes_are_the_published_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    # It sets these for its whole process; the other tests must not see them.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from _models import SHAPES

    published = json.loads((ROOT / "tests" / "published_configs.json").read_text("utf-8"))
    configs = {name: read_config(raw, name)[1] for name, raw in SHAPES.items()}
    for name in ("Llama-3.1-8B", "gemma-2-9b"):
        assert configs[name] == read_config(published[name]["config"], name)[1]
    counts = {name: num_parameters(config) for name, config in configs.items()}
    assert counts == {
        "SmolLM2-135M": published["SmolLM2-135M-Instruct"]["parameters"],
        "SmolLM2-360M": 361_821_120,  # as the hub counts them
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2-1.5B": published["Qwen2-1.5B"]["parameters"],
        "Llama-3.1-8B": published["Llama-3.1-8B"]["parameters"],
        "Llama-3.1-70B": 70_553_706_496,  # as the hub counts them
        "gemma-2-9b": published["gemma-2-9b"]["parameters"],
    }
