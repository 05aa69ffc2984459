"""Batched LAPACK calls deadlock in some jaxlibs; ours must not (jaxgrad.spectra.linalg says why)."""

import subprocess
import sys
from pathlib import Path

TIME_LIMIT = 600  # seconds; it takes about one minute, and a deadlock takes for ever


def test_100_batches_of_mixed_lengths_do_not_hang():
    script = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, str(script), "100"],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done 100 batches, 5 shapes" in done.stdout
