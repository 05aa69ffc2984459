"""`bin/analyze --dry_run`: what a run would do and need, before it is begun. Writes nothing."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgrad.batches import MAX_SHAPES, Batch, BatchShape, batch_arrays, count_shapes
from jaxgrad.examples import Fields, read_examples
from jaxgrad.jobs import run_places
from jaxgrad.memory import (
    BatchChoice,
    DiskPrediction,
    MemoryPrediction,
    largest_shape,
    predict_disk,
)
from jaxgrad.options import AnalyzeOptions
from jaxgrad.pipeline import Session
from jaxgrad.planning import (
    date_for,
    fit_batches,
    recorded_date,
    tokenize_examples,
    with_recorded_choices,
)
from jaxgrad.run_info import memory_line, memory_warnings, model_line, resident_bytes, sizes_on_disk
from jaxgrad.sharding import replicated_line
from jaxgrad.tokens import TokenizedExample, uses_chat
from jaxgrad.windows import WINDOW, Window, plan_windows

CALIBRATION_REPEATS = 2


@dataclass(frozen=True)
class Preflight:
    """What a run on one data file would do and need.

    Attributes:
        num_examples: of the file, after start and limit.
        num_measured: those that can be measured.
        num_matrices: rows of the matrices table.
        shapes: batch shape -> how many batches have it, largest first.
        memory: of the largest batch; None where there is none.
        choice: of batch_tokens.
        seconds: estimated by a calibration, compilations included; None without one.
    """

    num_examples: int
    num_measured: int
    num_matrices: int
    shapes: dict[BatchShape, int]
    memory: MemoryPrediction | None
    disk: DiskPrediction
    choice: BatchChoice
    seconds: float | None


def dry_run(
    *,
    model_path: str | None,
    data_paths: Sequence[str | Path],
    options: AnalyzeOptions = AnalyzeOptions(),
    output_dir: str | Path | None = None,
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
    calibrate: bool = False,
    mesh: str = "auto",
    say: Callable[[str], None] = print,
) -> list[Preflight]:
    """Plan runs as `run_analysis` would; read data, tokenizer and config, and print what is needed.

    Args:
        model_path: see `bin/analyze --help`.
        data_paths: one file or several.
        options: what to measure.
        output_dir: only looked into, for the date and the batch_tokens of the run to be continued.
        start: index of the first example of each file.
        limit: how many examples of each file.
        fields: the names of a record's fields.
        calibrate: load the weights, measure the median batch and estimate the time.
        mesh: as `run_analysis` takes it; without `calibrate` its devices need not be there.
        say: takes the lines for the user.

    Raises:
        UserError: any bad input, in one line.
    """
    session, found = Session(model_path, options, mesh=mesh), []
    places = {} if output_dir is None else run_places(data_paths, output_dir)
    for path in data_paths:
        data = read_examples(path, start=start, limit=limit, fields=fields)
        place = places.get(path)
        recorded = None if place is None else recorded_date(place)
        own = dataclasses.replace(options, date=date_for(options, [recorded]))
        if place is not None:
            own = with_recorded_choices(own, place)
        checkpoint = session.checkpoint
        config = checkpoint.config
        tokenized = tokenize_examples(checkpoint.tokenizer, config, data.examples, own)
        shape = session.settle_mesh(own, tokenized)
        own, choice = fit_batches(own, config, tokenized, mesh=shape)
        settings = own.settings_for(config)
        windows = plan_windows(tokenized, own)
        shapes = count_shapes(batch for window in windows for batch in window.batches)
        measured = [item for item in tokenized if item.measurable]
        largest = largest_shape(config, own.dtype, settings, shapes, shape) if shapes else None
        disk = predict_disk(
            settings,
            config,
            sizes_on_disk(tokenized),
            window=WINDOW,
            examples_a_batch=len(measured) / max(1, sum(shapes.values())),
        )
        if largest is not None:
            needs = largest, largest, disk, choice, resident_bytes()
            say(memory_line(*needs, layerwise=settings.layerwise))
        for line in memory_warnings(choice):
            say(line)
        told = replicated_line(config, shape)
        if told is not None:
            say(told)
        per_example = settings.selection.num_matrices
        chat = "chat template" if uses_chat(checkpoint.tokenizer, own.chat) else "plain text"
        say(
            f"{model_line(checkpoint, own.dtype)} on {data.path}: {len(measured)} of "
            f"{len(tokenized)} examples, {per_example} matrices each "
            f"({per_example * len(measured)} in all), protocol {own.protocol}, {chat}"
        )
        for line in _token_lines(tokenized):
            say(line)
        say(
            f"batch_tokens {choice.batch_tokens}; {sum(shapes.values())} batches of {len(shapes)} "
            f"shapes (at most {MAX_SHAPES}), examples x tokens x response positions:"
        )
        for batch, count in shapes.items():
            say(f"  {count} x ({batch.num_examples} x {batch.num_tokens} x {batch.num_responses})")
        seconds = None
        if calibrate and shapes:
            seconds = _estimate_seconds(session, own, windows, len(shapes), say)
        found.append(
            Preflight(
                num_examples=len(tokenized),
                num_measured=len(measured),
                num_matrices=per_example * len(measured),
                shapes=shapes,
                memory=largest,
                disk=disk,
                choice=choice,
                seconds=seconds,
            )
        )
    say("dry run: nothing was computed and nothing was written")
    return found


def _token_lines(tokenized: Sequence[TokenizedExample]) -> list[str]:
    measured = [item for item in tokenized if item.measurable]
    lines = []
    for what, counts in (
        ("tokens", [item.num_tokens for item in measured]),
        ("response tokens", [item.num_response_tokens for item in measured]),
    ):
        if counts:
            low, middle, high = np.percentile(counts, (0, 50, 100))
            lines.append(
                f"{what} an example: {low:.0f} to {high:.0f}, median {middle:.0f}, "
                f"{sum(counts)} in all"
            )
    truncated = sum(item.truncated for item in tokenized)
    lines.append(f"{len(tokenized) - len(measured)} skipped, {truncated} truncated")
    return lines


def _estimate_seconds(
    session: Session,
    options: AnalyzeOptions,
    windows: Sequence[Window],
    num_shapes: int,
    say: Callable[[str], None],
) -> float:
    """Seconds of the whole run, from the batch of the median size, by padded tokens."""

    def tokens(batch: Batch) -> int:
        return batch.shape.num_examples * batch.shape.num_tokens

    plan = sorted(
        ((window, batch) for window in windows for batch in window.batches),
        key=lambda pair: tokens(pair[1]),
    )
    window, batch = plan[len(plan) // 2]
    programs, state = session.programs_for(options), session.model.state
    arrays = batch_arrays(batch, window.tokenized)
    before = programs.tally.seconds
    programs.measure(state, batch.shape, arrays)  # compiles
    compiling = (programs.tally.seconds - before) * num_shapes
    times = []
    for _ in range(CALIBRATION_REPEATS):
        started = time.perf_counter()
        programs.measure(state, batch.shape, arrays)
        times.append(time.perf_counter() - started)
    running = min(times) / tokens(batch) * sum(tokens(other) for _, other in plan)
    say(
        f"time: about {_duration(running)} and {_duration(compiling)} of compilations, from a batch "
        f"of {batch.shape.num_examples} x {batch.shape.num_tokens} tokens that took {min(times):.2f} s"
    )
    return running + compiling


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
