"""What a run says about itself: its provenance, the lines before it starts, and the counts that end it."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxgrad.batches import BatchShape
from jaxgrad.examples import DataSet
from jaxgrad.memory import BatchChoice, DiskPrediction, MemoryPrediction, batches_in_flight
from jaxgrad.models import Checkpoint
from jaxgrad.models.decoder import num_parameters
from jaxgrad.program import CompileTally, MemoryPlan
from jaxgrad.results import iter_results
from jaxgrad.sharding import ONE_DEVICE, MeshShape
from jaxgrad.tokens import TokenizedExample

MOST_REASONS = 20  # that a run's end lists


def session_info(
    checkpoint: Checkpoint, data: DataSet, mesh: MeshShape, *, num_processes: int = 1
) -> dict[str, Any]:
    """Where a session's numbers come from: versions, commit, devices, command, files.

    Of several processes it is the leading one's; devices are counted in all of them.
    """
    device = jax.local_devices()[0]
    return provenance() | {
        "model": checkpoint.name,
        "model_files": checkpoint.files,
        "data_path": str(data.path),
        "device": {
            "backend": jax.default_backend(),
            "kind": device.device_kind,
            "count": jax.device_count(),
            "mesh": str(mesh),
            "machine": platform.machine(),
        },
        "processes": num_processes,
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


def memory_line(
    plan: MemoryPlan | MemoryPrediction,
    prediction: MemoryPrediction,
    disk: DiskPrediction,
    choice: BatchChoice,
    program: int,
    *,
    layerwise: bool = False,
) -> str:
    """What the run will need: weights, the largest batch's work space, on a CPU the program, and disk.

    Args:
        plan: of the largest batch: XLA's account, or the prediction where nothing is compiled.
        prediction: of that batch, for what of the work space are factors.
        disk: what the run writes.
        choice: of batch_tokens.
        program: `resident_bytes` before the weights are there.
        layerwise: whether the factors are one layer's at a time.
    """
    shape, mesh = plan.shape, plan.mesh
    # A batch that had to be halved to compile has less of the factors.
    factors = prediction.factors * mesh.rows(shape.num_examples)
    factors //= mesh.rows(prediction.shape.num_examples)
    text = (
        f"memory{'' if mesh == ONE_DEVICE else f' per device of mesh {mesh}'}: "
        f"{_size(plan.weights)} weights + "
        f"{'2 x ' if batches_in_flight(mesh) == 2 else ''}{_size(plan.work_space)} work space "
        f"({_size(factors)} of it factors; largest batch: {shape.num_examples} x "
        f"{shape.num_tokens} tokens)"
    )
    if jax.default_backend() != "cpu":
        text += f" = {_size(plan.total)} on the device"
    elif mesh == ONE_DEVICE:
        text += f" + {_size(program)} program = {_size(plan.total + program)} planned"
    else:
        text += f" = {_size(plan.total)}; {mesh.num_devices} of them + {_size(program)} program = "
        text += f"{_size(mesh.num_devices * plan.total + program)} planned"
    if layerwise:
        text += "; layers are reduced one by one in the backward pass"
    text += f"; disk: {_size(disk.parquet)} + {_size(disk.journal)} journal"
    if choice.batch_tokens != choice.default and choice.at_hand is not None:
        text += (
            f"; batch_tokens {choice.default} -> {choice.batch_tokens} to fit "
            f"{_size(choice.at_hand)}"
        )
    return text


def memory_shortage(choice: BatchChoice) -> str:
    """What the largest batch needs, and what is there."""
    return f"about {_size(choice.needed)} and {_size(choice.at_hand or 0)} are at hand"


def memory_warnings(choice: BatchChoice) -> list[str]:
    """A line where the largest batch does not fit; none where it does."""
    if choice.fits:
        return []
    return [
        f"warning: the largest batch needs {memory_shortage(choice)}: the run may fail or be slow; "
        "a smaller --max_length or --batch_tokens needs less"
    ]


def halved_line(shape: BatchShape, half: BatchShape) -> str:
    """That batches of a shape are measured in parts."""
    return (
        f"out of memory: batches of {shape.num_examples} x {shape.num_tokens} tokens are measured as "
        f"{half.num_examples} x {half.num_tokens}"
    )


def sizes_on_disk(tokenized: Sequence[TokenizedExample]) -> list[tuple[int, int]]:
    """Tokens and characters of each example that will be measured."""
    return [
        (item.num_tokens, len(item.example.instruction) + len(item.example.response))
        for item in tokenized
        if item.measurable
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 5e6 else f"{num_bytes / 1e6:.2f} MB"


def model_line(checkpoint: Checkpoint, dtype: str) -> str:
    """The model, its size and where it runs."""
    millions = num_parameters(checkpoint.config) / 1e6
    return f"{checkpoint.name} ({millions:.1f}M, {dtype}, {jax.default_backend()})"


def count_results(
    tokenized: Sequence[TokenizedExample],
    output_dir: str | Path,
    compiled: CompileTally,
    halves: dict[BatchShape, BatchShape],
) -> dict[str, Any]:
    """Examples of each status and reason, from what was written; the compilations; the halved shapes."""
    status: Counter[str] = Counter()
    reasons: list[str] = []
    for part in iter_results(output_dir, allow_unfinished=True):
        status.update(part.examples["status"])
        reasons.extend(part.examples["reason"].dropna())
    return {
        "examples": len(tokenized),
        "ok": status["ok"],
        "skipped": status["skipped"],
        "non_finite": status["non_finite"],
        "truncated": sum(item.truncated for item in tokenized),
        "reasons": count_reasons(reasons),
        "compiled_shapes": compiled.shapes,
        "compile_seconds": round(compiled.seconds, 1),
        "halved_shapes": {
            f"{shape.num_examples} x {shape.num_tokens} x {shape.num_responses}": half.num_examples
            for shape, half in halves.items()
        },
    }


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, by name; beyond `MOST_REASONS` of them the rarest are summed.

    A model that overflows names another place for one example than for the next, and a run's end
    should not list hundreds.
    """
    by_count = sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0]))
    listed, rest = dict(sorted(by_count[:MOST_REASONS])), by_count[MOST_REASONS:]
    if rest:
        others = f"one of {len(rest)} other reasons (they stand in the table of examples)"
        listed[others] = sum(count for _, count in rest)
    return listed


def summary_lines(counts: dict[str, Any]) -> list[str]:
    """The lines that end a run's output."""
    lines = [
        f"compiled {counts['compiled_shapes']} shapes in {counts['compile_seconds']} s",
        f"{counts['examples']} examples: {counts['ok']} measured, {counts['skipped']} skipped, "
        f"{counts['non_finite']} not finite; {counts['truncated']} truncated",
    ]
    return lines + [f"  {count} x {reason}" for reason, count in counts["reasons"].items()]
