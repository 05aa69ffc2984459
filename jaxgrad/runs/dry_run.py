"""`bin/analyze --dry_run`: what a run would do and need, before it is begun. Writes nothing."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgrad.data.batches import Batch, batch_arrays
from jaxgrad.data.examples import Fields
from jaxgrad.data.read import AUTO, read_examples
from jaxgrad.measure.memory import resident_bytes
from jaxgrad.models.sharding import replicated_line
from jaxgrad.options import AnalyzeOptions, ModelOptions
from jaxgrad.runs.asked import date_for, recorded_date, run_directories, with_recorded_choices
from jaxgrad.runs.plan import RunPlan
from jaxgrad.runs.report_lines import dry_run_lines, memory_line, memory_warnings, note_lines
from jaxgrad.runs.session import Session

CALIBRATION_REPEATS = 2


@dataclass(frozen=True)
class DryRun:
    """What a run on one data file would do and need.

    Attributes:
        plan: of the run.
        seconds: estimated by a calibration, compilations included; None without one.
    """

    plan: RunPlan
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
    data_format: str = AUTO,
    response: str | None = None,
    calibrate: bool = False,
    mesh: str = "auto",
    model_options: ModelOptions = ModelOptions(),
    say: Callable[[str], None] = print,
) -> list[DryRun]:
    """Plan runs as `run_analysis` would; read data, tokenizer and config, and print what is needed.

    Args:
        model_path: see `bin/analyze --help`.
        data_paths: one file or several.
        options: what to measure.
        output_dir: only looked into, for the date and the batch_tokens of the run to be continued.
        start: index of the first example of each file.
        limit: how many examples of each file.
        fields: the names of a record's fields.
        data_format: which kind of records, one of `data.read.FORMAT_NAMES`.
        response: "chosen" or "rejected", for records that have both.
        calibrate: load the weights, measure the median batch and estimate the time.
        mesh: as `run_analysis` takes it; without `calibrate` its devices need not be there.
        model_options: an adapter's base, and a hub id's revision.
        say: takes the lines for the user.

    Raises:
        UserError: any bad input, in one line.
    """
    session, found = Session(model_path, options, mesh=mesh, model_options=model_options), []
    directories = {} if output_dir is None else run_directories(data_paths, output_dir)
    for path in data_paths:
        data = read_examples(
            path,
            start=start,
            limit=limit,
            fields=fields,
            data_format=data_format,
            response=response,
        )
        directory = directories.get(path)
        recorded = None if directory is None else recorded_date(directory)
        own = dataclasses.replace(options, date=date_for(options, [recorded]))
        if directory is not None:
            own = with_recorded_choices(own, directory)
        for line in data.lines:
            say(line)
        plan = session.plan(data, own)
        if plan.memory is not None:
            say(memory_line(plan, plan.memory, resident_bytes()))
        for line in memory_warnings(plan.choice):
            say(line)
        whole = replicated_line(plan.config, plan.mesh)
        if whole is not None:
            say(whole)
        for line in dry_run_lines(plan, data.path, _token_lines(plan)):
            say(line)
        for line in (*session.checkpoint.lines(), *note_lines(plan)):
            say(line)
        seconds = _estimate_seconds(session, plan, say) if calibrate and plan.shapes else None
        found.append(DryRun(plan, seconds))
    say("dry run: nothing was computed and nothing was written")
    return found


def _token_lines(plan: RunPlan) -> list[str]:
    measurable = plan.measurable
    lines = []
    for what, counts in (
        ("tokens", [item.num_tokens for item in measurable]),
        ("response tokens", [item.num_response_tokens for item in measurable]),
    ):
        if counts:
            low, middle, high = np.percentile(counts, (0, 50, 100))
            lines.append(
                f"{what} an example: {low:.0f} to {high:.0f}, median {middle:.0f}, "
                f"{sum(counts)} in all"
            )
    truncated = sum(item.truncated for item in plan.tokenized)
    lines.append(f"{len(plan.tokenized) - len(measurable)} skipped, {truncated} truncated")
    return lines


def _estimate_seconds(session: Session, plan: RunPlan, say: Callable[[str], None]) -> float:
    """Seconds of the whole run, from the batch of the median size, by padded tokens."""

    def tokens(batch: Batch) -> int:
        return batch.shape.num_examples * batch.shape.num_tokens

    batches = sorted(plan.batches, key=lambda pair: tokens(pair[1]))
    window, batch = batches[len(batches) // 2]
    programs, state = session.programs_for(plan), session.model.state
    arrays = batch_arrays(batch, window.tokenized)
    seconds_at_start = programs.tally.seconds
    programs.measure(state, batch.shape, arrays)  # compiles
    compiling = (programs.tally.seconds - seconds_at_start) * len(plan.shapes)
    times = []
    for _ in range(CALIBRATION_REPEATS):
        started = time.perf_counter()
        programs.measure(state, batch.shape, arrays)
        times.append(time.perf_counter() - started)
    running = min(times) / tokens(batch) * sum(tokens(other) for _, other in batches)
    say(
        f"time: about {_duration(running)} and {_duration(compiling)} of compilations, from a batch "
        f"of {batch.shape.num_examples} x {batch.shape.num_tokens} tokens that took {min(times):.2f} s"
    )
    return running + compiling


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
