"""The one file that wires the stages: examples -> tokens -> model -> gradients -> spectra -> results.

`analyze` is the stream of results in memory; `run_analysis` writes them to a directory, continues an
interrupted run, and is what `bin/analyze` calls.
"""

import dataclasses
import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from jaxgrad.batches import Batch, BatchShape, batch_arrays, plan_batches, shape_bound
from jaxgrad.errors import UserError
from jaxgrad.examples import DataSet, Example, Fields, read_examples
from jaxgrad.gradients import select_parameters
from jaxgrad.measure import MeasureSettings, Method
from jaxgrad.models import Checkpoint, DecoderConfig, LoadedModel, open_checkpoint
from jaxgrad.program import MemoryPlan, Programs
from jaxgrad.results import ExampleResult, RunDirectory, iter_results, write_authors_jsonl
from jaxgrad.results.rows import example_results, skipped_result
from jaxgrad.results.store import load_run
from jaxgrad.tokens import Protocol, TokenizedExample, tokenize_all, tokens_digest, uses_chat

# Consecutive examples that are sorted into batches together and become one part file. More would pad
# less; fewer would show results sooner.
WINDOW = 256
# Padded tokens of a batch. A CPU gains nothing from a batch beyond its first example (BUILD_NOTES.md).
DEFAULT_BATCH_TOKENS = {"cpu": 1, "gpu": 8192, "tpu": 8192}
AUTHORS_FILE = "authors.jsonl"


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """What to measure and how; every field stands behind a flag of `bin/analyze`.

    Attributes:
        protocol: "paper" (the authors', to compare with) or "clean" (see `tokens`).
        chat: whether the chat template is used; "auto" means where the tokenizer has one.
        parameters: "attention", "mlp", "all", or a regular expression on the weights' names.
        batch_tokens: padded tokens of a batch; None for the backend's default.
    """

    protocol: Literal["paper", "clean"] = "paper"
    chat: Literal["auto", "yes", "no"] = "auto"
    max_length: int = 1024
    parameters: str = "attention"
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    batch_tokens: int | None = None
    dtype: str = "float32"
    precision: str = "highest"


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended: where, how many examples of each status and reason, and what it cost."""

    output_dir: Path
    counts: dict[str, Any]
    reused: bool


@dataclasses.dataclass(frozen=True)
class _Window:
    """Consecutive examples, and the batches of those that can be measured."""

    tokenized: Sequence[TokenizedExample]
    batches: Sequence[Batch]


def analyze(
    model: LoadedModel, examples: Sequence[Example], options: AnalyzeOptions = AnalyzeOptions()
) -> Iterator[ExampleResult]:
    """Measure examples one batch after the other.

    Args:
        model: from `load_model`; its dtype is the one computed in (`options.dtype` is not read).
        examples: from `read_examples`.
        options: see `AnalyzeOptions`.

    Yields:
        One result an example, as batches finish: sorted by length, not by index. Examples that cannot
        be measured come first in their window, with the reason.

    Raises:
        UserError: an option that does not fit the model.
    """
    options = dataclasses.replace(options, dtype=model.dtype)
    tokenized = _tokenize(model.tokenizer, model.config, examples, options)
    programs = Programs(model.config, model.dtype, _settings(model.config, options))
    for window in _windows(tokenized, options):
        yield from (skipped_result(item) for item in window.tokenized if not item.measurable)
        for batch in window.batches:
            yield from _measure(programs, model, window, batch, options)


def run_analysis(
    *,
    model_path: str | None,
    data_path: str | Path,
    output_dir: str | Path,
    options: AnalyzeOptions = AnalyzeOptions(),
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
    output_format: Literal["parquet", "jsonl"] = "parquet",
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> RunSummary:
    """Measure a data file into a directory; continue where an interrupted run stopped.

    Args:
        model_path, data_path, output_dir: see `bin/analyze --help`.
        start, limit: the slice of the data file.
        output_format: "jsonl" also writes the authors' JSONL (which needs the extremes, so measures
            them), next to the Parquet that makes the run resumable.
        say: takes the lines for the user.
        progress: show a bar on stderr.

    Raises:
        UserError: any bad input, in one line, before anything is computed.
    """
    output_dir = Path(output_dir)
    if output_format == "jsonl":
        options = dataclasses.replace(options, extremes=True)
    data = read_examples(data_path, start=start, limit=limit, fields=fields)
    asked = _asked_identity(data, options, start, limit)
    RunDirectory.check_compatible(output_dir, asked)
    RunDirectory.probe(output_dir)
    checkpoint = open_checkpoint(model_path)
    earlier = _finished_before(output_dir, checkpoint)
    if earlier is not None:
        say(f"{output_dir} holds this run already, finished: nothing to compute")
        if output_format == "jsonl":
            _write_jsonl(output_dir, options, say)
        return RunSummary(output_dir, earlier, reused=True)

    tokenized = _tokenize(checkpoint.tokenizer, checkpoint.config, data.examples, options)
    windows = _windows(tokenized, options)
    programs = Programs(checkpoint.config, options.dtype, _settings(checkpoint.config, options))
    shapes = Counter(batch.shape for window in windows for batch in window.batches)
    if shapes:
        largest = max(shapes, key=lambda s: (s.num_examples * s.num_tokens, s.num_responses))
        say(_memory_line(programs.memory(largest)))
    say(_plan_line(checkpoint, data, tokenized, shapes, options))
    model = checkpoint.load(options.dtype)
    identity = asked | {
        "model": {"weights_sha256": model.fingerprint, "config": dataclasses.asdict(model.config)},
        "tokens_sha256": tokens_digest(tokenized),
    }
    with RunDirectory.open(output_dir, identity, _session_info(checkpoint, data)) as store:
        if not store.finished:
            _run_windows(store, windows, programs, model, options, progress)
            store.finish(_counts(tokenized, output_dir, programs))
        counts = store.run["counts"]
    for line in summary_lines(counts):
        say(line)
    if output_format == "jsonl":
        _write_jsonl(output_dir, options, say)
    say(f"results: {output_dir}/examples, {output_dir}/matrices, {output_dir}/run.json")
    return RunSummary(output_dir, counts, reused=False)


def _run_windows(
    store: RunDirectory,
    windows: Sequence[_Window],
    programs: Programs,
    model: LoadedModel,
    options: AnalyzeOptions,
    progress: bool,
) -> None:
    plan = [(w, b, batch) for w, window in enumerate(windows) for b, batch in enumerate(window.batches)]
    done = {(w, b) for w, b, _ in plan if store.window_done(w) or store.batch_done(w, b)}
    bar = tqdm(
        total=sum(len(batch.members) for _, _, batch in plan),
        # What an earlier session did is progress, but not speed.
        initial=sum(len(batch.members) for w, b, batch in plan if (w, b) in done),
        unit="example",
        disable=not progress,
        dynamic_ncols=True,
    )
    with bar:
        for w, window in enumerate(windows):
            for b, batch in enumerate(window.batches):
                if (w, b) in done:
                    continue
                store.write_batch(w, b, _measure(programs, model, window, batch, options))
                bar.update(len(batch.members))
            skipped = [skipped_result(item) for item in window.tokenized if not item.measurable]
            store.finish_window(w, skipped, num_examples=len(window.tokenized))


def _measure(
    programs: Programs, model: LoadedModel, window: _Window, batch: Batch, options: AnalyzeOptions
) -> list[ExampleResult]:
    arrays = batch_arrays(batch, window.tokenized)
    loss_B, statistics = programs.measure(model.state, batch.shape, arrays)
    members = [window.tokenized[member] for member in batch.members]
    selection = select_parameters(model.config, options.parameters)
    return example_results(members, loss_B, statistics, selection, model.config)


def _settings(config: Any, options: AnalyzeOptions) -> MeasureSettings:
    return MeasureSettings(
        selection=select_parameters(config, options.parameters),
        method=options.method,
        spectrum=options.spectrum,
        extremes=options.extremes,
        precision=options.precision,
    )


def _tokenize(
    tokenizer: Any, config: DecoderConfig, examples: Sequence[Example], options: AnalyzeOptions
) -> list[TokenizedExample]:
    if options.max_length > config.max_positions:
        raise UserError(
            f"--max_length {options.max_length} exceeds the model's {config.max_positions} "
            f"positions; give --max_length={config.max_positions} or less"
        )
    protocol = Protocol(options.protocol, uses_chat(tokenizer, options.chat), options.max_length)
    tokenized = tokenize_all(examples, tokenizer, protocol)
    for item in tokenized:
        # JAX would clamp such an id to the last row of the embedding, in silence.
        if item.num_tokens and item.token_ids.max() >= config.vocab_size:
            raise UserError(
                f"record {item.example.index} has token {item.token_ids.max()}, but the model has "
                f"only {config.vocab_size} tokens: the tokenizer is not this model's; copy the "
                "tokenizer's files from where the weights come from"
            )
    return tokenized


def _batch_tokens(options: AnalyzeOptions) -> int:
    if options.batch_tokens is not None:
        return options.batch_tokens
    return DEFAULT_BATCH_TOKENS[jax.default_backend()]


def _windows(tokenized: Sequence[TokenizedExample], options: AnalyzeOptions) -> list[_Window]:
    windows = []
    for begin in range(0, len(tokenized), WINDOW):
        part = tokenized[begin : begin + WINDOW]
        batches = plan_batches(
            part, batch_tokens=_batch_tokens(options), max_length=options.max_length
        )
        windows.append(_Window(part, batches))
    return windows


def _asked_identity(
    data: DataSet, options: AnalyzeOptions, start: int, limit: int | None
) -> dict[str, Any]:
    """What the numbers depend on and is known before a model is opened."""
    return {
        "data": {"sha256": data.sha256, "start": start, "limit": limit},
        "options": dataclasses.asdict(options) | {"batch_tokens": _batch_tokens(options)},
        "window": WINDOW,
    }


def _finished_before(output_dir: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The counts of the finished run in `output_dir`, if it was made from these very model files.

    The options were compared before. Files of the same names, sizes and times are taken for the same:
    the alternative is to read the whole model only to say that there is nothing to do.
    """
    run = load_run(output_dir)
    if run is None or not run["finished"]:
        return None
    files = {name: list(stat) for name, stat in checkpoint.files.items()}
    return run["counts"] if run["sessions"][-1]["info"].get("model_files") == files else None


def _session_info(checkpoint: Checkpoint, data: DataSet) -> dict[str, Any]:
    packages = ("jaxgrad", "jax", "jaxlib", "flax", "transformers", "numpy")
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "model": checkpoint.name,
        "model_files": checkpoint.files,
        "data_path": str(data.path),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "commit": _commit(),
        "device": {
            "backend": jax.default_backend(),
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": platform.machine(),
        },
    }


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _memory_line(plan: MemoryPlan) -> str:
    gigabyte = 1e9
    text = (
        f"memory: {plan.weights / gigabyte:.2f} GB weights + {plan.work_space / gigabyte:.2f} GB work "
        f"space (largest batch: {plan.shape.num_examples} x {plan.shape.num_tokens} tokens)"
    )
    if jax.default_backend() != "cpu":
        return f"{text} = {plan.total / gigabyte:.2f} GB on the device"
    unit = 1 if sys.platform == "darwin" else 1024
    program = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    total = (plan.total + program) / gigabyte
    return f"{text} + {program / gigabyte:.2f} GB program = {total:.2f} GB planned"


def _plan_line(
    checkpoint: Checkpoint,
    data: DataSet,
    tokenized: Sequence[TokenizedExample],
    shapes: Counter[BatchShape],
    options: AnalyzeOptions,
) -> str:
    selection = select_parameters(checkpoint.config, options.parameters)
    measurable = sum(item.measurable for item in tokenized)
    chat = "chat template" if uses_chat(checkpoint.tokenizer, options.chat) else "plain text"
    return (
        f"{checkpoint.name} ({checkpoint.config.num_parameters / 1e6:.1f}M, {options.dtype}, "
        f"{jax.default_backend()}) on {data.path}: {measurable} of {len(tokenized)} examples, "
        f"{selection.num_matrices} matrices each, protocol {options.protocol}, {chat}; "
        f"{len(shapes)} shapes to compile (bound {shape_bound(options.max_length)})"
    )


def _counts(
    tokenized: Sequence[TokenizedExample], output_dir: Path, programs: Programs
) -> dict[str, Any]:
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
        "compiled_shapes": programs.num_compiled,
        "compile_seconds": round(programs.compile_seconds, 1),
    }


def summary_lines(counts: dict[str, Any]) -> list[str]:
    """The lines that end a run's output."""
    lines = [
        f"compiled {counts['compiled_shapes']} shapes in {counts['compile_seconds']} s",
        f"{counts['examples']} examples: {counts['ok']} measured, {counts['skipped']} skipped, "
        f"{counts['non_finite']} not finite; {counts['truncated']} truncated",
    ]
    return lines + [f"  {count} x {reason}" for reason, count in counts["reasons"].items()]


def _write_jsonl(output_dir: Path, options: AnalyzeOptions, say: Callable[[str], None]) -> None:
    path = output_dir / AUTHORS_FILE
    count = write_authors_jsonl(
        iter_results(output_dir), path, with_spectrum=options.spectrum
    )
    say(f"authors' JSONL: {path} ({count} lines)")
