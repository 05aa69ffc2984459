"""The lines that a run prints: what it is about to do and need, and the counts that end it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxgrad.data.batches import MAX_SHAPES, BatchShape
from jaxgrad.data.tokens import TokenizedExample, count_notes
from jaxgrad.measure.memory import BatchChoice, MemoryPrediction, batches_in_flight, bytes_text
from jaxgrad.measure.programs import CompiledMemory, CompileTally
from jaxgrad.models.decoder import num_parameters
from jaxgrad.models.sharding import ONE_DEVICE
from jaxgrad.results import iter_results
from jaxgrad.runs.plan import RunPlan

MOST_REASONS = 20  # that a run's end lists


def memory_line(plan: RunPlan, found: CompiledMemory | MemoryPrediction, program: int) -> str:
    """What the run will need: weights, the largest batch's work space, on a CPU the program, and disk.

    Args:
        plan: with a batch to measure.
        found: of the largest batch: XLA's account, or the prediction where nothing is compiled.
        program: bytes of this process before the weights are there.
    """
    assert plan.memory is not None
    shape, mesh, choice = found.shape, found.mesh, plan.choice
    # A batch that had to be halved to compile has less of the factors.
    factors = plan.memory.factors * mesh.rows(shape.num_examples)
    factors //= mesh.rows(plan.memory.shape.num_examples)
    text = (
        f"memory{'' if mesh == ONE_DEVICE else f' per device of mesh {mesh}'}: "
        f"{bytes_text(found.weights)} weights + "
        f"{'2 x ' if batches_in_flight(mesh) == 2 else ''}{bytes_text(found.work_space)} work space "
        f"({bytes_text(factors)} of it factors; largest batch: {shape.num_examples} x "
        f"{shape.num_tokens} tokens)"
    )
    if jax.default_backend() != "cpu":
        text += f" = {bytes_text(found.total)} on the device"
    elif mesh == ONE_DEVICE:
        text += f" + {bytes_text(program)} program = {bytes_text(found.total + program)} planned"
    else:
        planned = mesh.num_devices * found.total + program
        text += f" = {bytes_text(found.total)}; {mesh.num_devices} of them + {bytes_text(program)} "
        text += f"program = {bytes_text(planned)} planned"
    if plan.settings.layerwise:
        text += "; layers are reduced one by one in the backward pass"
    text += f"; disk: {bytes_text(plan.disk.parquet)} + {bytes_text(plan.disk.journal)} journal"
    if choice.batch_tokens != choice.default and choice.at_hand is not None:
        text += (
            f"; batch_tokens {choice.default} -> {choice.batch_tokens} to fit "
            f"{bytes_text(choice.at_hand)}"
        )
    return text


def memory_warnings(choice: BatchChoice) -> list[str]:
    """A line where the largest batch does not fit; none where it does."""
    if choice.fits:
        return []
    return [
        f"warning: the largest batch needs {choice.shortage}: the run may fail or be slow; "
        "a smaller --max_length or --batch_tokens needs less"
    ]


def run_line(plan: RunPlan, data_path: str | Path) -> str:
    """The model, its size, where it runs, and the examples and matrices that will be measured."""
    shapes = f"{len(plan.shapes)} batch shapes (at most {MAX_SHAPES})"
    return f"{_opening(plan, data_path)}; {shapes}"


def dry_run_lines(plan: RunPlan, data_path: str | Path, token_lines: Iterable[str]) -> list[str]:
    """The same, with all matrices and every batch shape."""
    num_matrices = plan.num_matrices * len(plan.measurable)
    lines = [
        _opening(plan, data_path, f" ({num_matrices} in all)"),
        *token_lines,
        f"batch_tokens {plan.choice.batch_tokens}; {sum(plan.shapes.values())} batches of "
        f"{len(plan.shapes)} shapes (at most {MAX_SHAPES}), examples x tokens x response positions:",
    ]
    for shape, count in plan.shapes.items():
        sizes = (shape.num_examples, shape.num_tokens, shape.num_responses)
        lines.append(f"  {count} x ({' x '.join(map(str, sizes))})")
    return lines


def _opening(plan: RunPlan, data_path: str | Path, behind_matrices: str = "") -> str:
    options, millions = plan.options, num_parameters(plan.config) / 1e6
    return (
        f"{plan.model_name} ({millions:.1f}M, {options.dtype}, {jax.default_backend()}) on {data_path}: "
        f"{len(plan.measurable)} of {len(plan.tokenized)} examples, {plan.num_matrices} matrices each"
        f"{behind_matrices}, protocol {options.protocol}, "
        f"{_form_of(plan)}"
        f"{', all turns' if options.turns == 'all' else ''}, at most {options.max_length} tokens"
    )


def _form_of(plan: RunPlan) -> str:
    examples = [item.example for item in plan.tokenized]
    if examples and all(example.given for example in examples):
        return "tokens as given"
    # A text without a conversation is not rendered.
    return "chat template" if plan.uses_chat and any(e.messages for e in examples) else "plain text"


def note_lines(plan: RunPlan) -> list[str]:
    """What the user should know of the texts: what a template leaves out or renders otherwise, by count."""
    total = len(plan.tokenized)
    counts = count_notes(plan.tokenized)
    return [f"of {total} examples, {count}: {note}" for note, count in counts.items()]


def halved_line(shape: BatchShape, half: BatchShape) -> str:
    """That batches of a shape are measured in parts."""
    return (
        f"out of memory: batches of {shape.num_examples} x {shape.num_tokens} tokens are measured as "
        f"{half.num_examples} x {half.num_tokens}"
    )


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
