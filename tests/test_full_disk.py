"""`bin/analyze` on a disk that really fills."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from result_runs import parts, small_disk
from tiny_models import Tiny, save_tiny

ROOT = Path(__file__).resolve().parent.parent


def analyze(model: Path, data: Path, output_dir: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bin/analyze"), f"--model_path={model}", "--chat=no"]
    command += [f"--data_path={data}", f"--output_dir={output_dir}", "--batch_tokens=1"]
    command += ["--max_length=32"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_a_disk_that_fills_under_a_run(tmp_path):
    """Exit code 2, one line, nothing written is lost; enlarged, the undisturbed run's bytes."""
    model = save_tiny(Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52), tmp_path / "model")
    data = tmp_path / "data.json"
    records = [{"instruction": f"count to {i}", "output": "one two " * (i % 5)} for i in range(300)]
    data.write_text(json.dumps(records))
    calm = analyze(model, data, tmp_path / "calm")
    assert calm.returncode == 0, calm.stderr
    with small_disk(tmp_path / "disk", "600k") as resize:
        run_dir = tmp_path / "disk/run"
        full = analyze(model, data, run_dir)
        assert full.returncode == 2
        errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "The disk is full" in errors[0], full.stderr
        assert "Traceback" not in full.stderr and "run the same command again" in errors[0]
        before = parts(run_dir)
        batches = [name for name in before if name.startswith("journal/")]
        assert len(batches) > 50 and not [name for name in before if name.endswith(".tmp")]
        again = analyze(model, data, run_dir)
        assert again.returncode == 2 and parts(run_dir).items() >= before.items()
        resize("64m")
        last = analyze(model, data, run_dir)
        assert last.returncode == 0, last.stderr
        assert parts(run_dir) == parts(tmp_path / "calm")
