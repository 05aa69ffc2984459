"""What a run says about itself: its provenance, the lines before it starts, and the counts that end it."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxgrad.examples import DataSet
from jaxgrad.models import Checkpoint
from jaxgrad.models.decoder import num_parameters
from jaxgrad.program import CompileTally, MemoryPlan
from jaxgrad.results import iter_results
from jaxgrad.tokens import TokenizedExample


def session_info(checkpoint: Checkpoint, data: DataSet) -> dict[str, Any]:
    """Where a session's numbers come from: versions, commit, device, command, files."""
    device = jax.devices()[0]
    return provenance() | {
        "model": checkpoint.name,
        "model_files": checkpoint.files,
        "data_path": str(data.path),
        "device": {
            "backend": jax.default_backend(),
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": platform.machine(),
        },
    }


def provenance() -> dict[str, Any]:
    """What wrote a result: command, versions, commit."""
    packages = ("jaxgrad", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "command": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def resident_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_line(plan: MemoryPlan, program: int) -> str:
    """What the run will need: weights, the largest batch's work space, and on a CPU the program itself.

    Args:
        plan: of the largest batch.
        program: `resident_bytes` before the weights are there.
    """
    gigabyte = 1e9
    text = (
        f"memory: {plan.weights / gigabyte:.2f} GB weights + {plan.work_space / gigabyte:.2f} GB work "
        f"space (largest batch: {plan.shape.num_examples} x {plan.shape.num_tokens} tokens)"
    )
    if jax.default_backend() != "cpu":
        return f"{text} = {plan.total / gigabyte:.2f} GB on the device"
    total = (plan.total + program) / gigabyte
    return f"{text} + {program / gigabyte:.2f} GB program = {total:.2f} GB planned"


def model_line(checkpoint: Checkpoint, dtype: str) -> str:
    """The model, its size and where it runs."""
    millions = num_parameters(checkpoint.config) / 1e6
    return f"{checkpoint.name} ({millions:.1f}M, {dtype}, {jax.default_backend()})"


def count_results(
    tokenized: Sequence[TokenizedExample], output_dir: Path, compiled: CompileTally
) -> dict[str, Any]:
    """Examples of each status and reason, from what was written; and the compilations."""
    status: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for part in iter_results(output_dir, allow_unfinished=True):
        status.update(part.examples["status"])
        reasons.update(part.examples["reason"].dropna())
    return {
        "examples": len(tokenized),
        "ok": status["ok"],
        "skipped": status["skipped"],
        "non_finite": status["non_finite"],
        "truncated": sum(item.truncated for item in tokenized),
        "reasons": dict(sorted(reasons.items())),
        "compiled_shapes": compiled.shapes,
        "compile_seconds": round(compiled.seconds, 1),
    }


def summary_lines(counts: dict[str, Any]) -> list[str]:
    """The lines that end a run's output."""
    lines = [
        f"compiled {counts['compiled_shapes']} shapes in {counts['compile_seconds']} s",
        f"{counts['examples']} examples: {counts['ok']} measured, {counts['skipped']} skipped, "
        f"{counts['non_finite']} not finite; {counts['truncated']} truncated",
    ]
    return lines + [f"  {count} x {reason}" for reason, count in counts["reasons"].items()]
