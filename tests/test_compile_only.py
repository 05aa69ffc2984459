"""Programs compile for devices that are not there, and hold nothing that those cannot run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ROOT / ".venv" / "compilers"


def compile_only(*flags):
    """Exit code, the line of JSON, stderr."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compile_only"), *flags],
        text=True, capture_output=True, timeout=1200, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return done.returncode, None if done.returncode == 2 else json.loads(lines[-1]), done.stderr


def programs_of(*flags):
    code, found, err = compile_only(*flags)
    assert code == 0, (found or {}).get("programs", err[-2000:])
    return found["programs"]


def needs(package):
    if not (COMPILERS / package).is_dir() and importlib.util.find_spec(package) is None:
        pytest.skip(
            f"{package} is not in {COMPILERS}: bin/test installs libtpu (docs/accelerators.md)"
        )


def test_a_tpu_gets_a_whole_batch():
    needs("libtpu")
    small = ["--layers=2", "--tokens=64", "--responses=16", "--batch=2", "--program=batch"]
    (program,) = programs_of("--target=tpu:v5e", *small, "--spectrum", "--extremes")
    # Eigenvectors of small blocks are all that is not a product or a loop.
    assert {name for name in program["custom_calls"] if "Eigh" in name or "Qr" in name} == {
        "EighTpu"
    }
    assert not program["collectives"]
    # Only statistics are float64: for each of two examples, two layers and four projections, 64 values.
    assert 0 < program["float64"] <= 2 * 2 * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "tpu:v5p", "cuda:h100"])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--dtype=bfloat16",),
        ("--similarity", "--extremes", "--spectrum"),
        ("--layerwise",),
        ("--method=dense",),
        ("--parameters=all",),
        ("--mesh=4x1,1x4,2x2",),
    ],
    ids=" ".join,
)
def test_every_program_compiles(target, flags):
    needs("libtpu" if target.startswith("tpu") else "jax_cuda12_plugin")
    programs_of(f"--target={target}", "--layers=2", "--tokens=128", "--program=batch", *flags)


def test_float64_is_refused_for_a_tpu():
    needs("libtpu")
    code, _, err = compile_only("--target=tpu:v5e", "--dtype=float64", "--layers=1", "--tokens=32")
    assert code == 2
    assert "error: --dtype=float64: a TPU has no float64" in err
