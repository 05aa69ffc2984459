"""The one file that wires the stages: examples -> plan -> gradients -> columns -> results.

`analyze` is the stream of results in memory. `run_analysis` writes them to a directory and continues an
interrupted run; `bin/analyze` calls it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from jaxgrad.checkpoints import LoadedModel
from jaxgrad.data.examples import Example, Fields
from jaxgrad.data.read import AUTO, read_examples
from jaxgrad.errors import UserError
from jaxgrad.measure.programs import Programs
from jaxgrad.measure.rows import skipped_result
from jaxgrad.measure.stream import measured
from jaxgrad.models.sharding import (
    ONE_DEVICE,
    make_mesh,
    parse_mesh,
    shape_of,
    spans_processes,
)
from jaxgrad.options import AnalyzeOptions, ModelOptions
from jaxgrad.processes.group import ALONE, Group
from jaxgrad.results import ExampleResult, iter_results, write_authors_jsonl
from jaxgrad.results.authors import refuse_other_loss
from jaxgrad.results.layout import AUTHORS_FILE
from jaxgrad.results.urls import path_below
from jaxgrad.runs.asked import ask_run, date_for, recorded_date, run_directories
from jaxgrad.runs.plan import RunPlan, plan_run, settings_for
from jaxgrad.runs.session import RunSummary, Session, say_nothing


def analyze(
    model: LoadedModel,
    examples: Sequence[Example],
    options: AnalyzeOptions = AnalyzeOptions(),
    *,
    programs: Programs | None = None,
) -> Iterator[ExampleResult]:
    """Measure examples one batch after the other.

    Args:
        model: from `load_model`; its dtype is the one computed in (`options.dtype` is not read).
        examples: from `read_examples`.
        options: see `AnalyzeOptions`.
        programs: from `programs_for` the same model and options, so that several calls compile each
            shape once; None compiles them anew.

    Yields:
        One result an example, as batches finish: sorted by length, not by index. Examples that cannot
        be measured come first in their window, with the reason.

    Raises:
        UserError: an option that does not fit the model.
    """
    plan = plan_for(model, examples, options)
    programs = programs or Programs(model.config, model.dtype, plan.settings, model.mesh)
    for window in plan.windows:
        yield from (skipped_result(item) for item in window.tokenized if not item.measurable)
        for results in measured(programs, model, [(window.tokenized, b) for b in window.batches]):
            yield from results


def plan_for(model: LoadedModel, examples: Sequence[Example], options: AnalyzeOptions) -> RunPlan:
    """The plan of `analyze`: on the model's devices, in its dtype.

    Raises:
        UserError: an option that does not fit the model.
    """
    options = dataclasses.replace(options, dtype=model.dtype)  # type: ignore[arg-type]
    mesh = shape_of(model.mesh)
    return plan_run(model, examples, options, mesh=mesh, loaded=model.weight_bytes)


def programs_for(model: LoadedModel, options: AnalyzeOptions) -> Programs:
    """The programs of a loaded model, none of them compiled yet.

    Raises:
        UserError: `options.parameters` selects none of the model's weights.
    """
    return Programs(model.config, model.dtype, settings_for(options, model.config), model.mesh)


def run_analysis(
    *,
    model_path: str | None,
    data_paths: Sequence[str | Path],
    output_dir: str | Path,
    options: AnalyzeOptions = AnalyzeOptions(),
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
    data_format: str = AUTO,
    response: str | None = None,
    output_format: Literal["parquet", "jsonl"] = "parquet",
    mesh: str = "auto",
    model_options: ModelOptions = ModelOptions(),
    say: Callable[[str], None] = print,
    progress: bool = True,
    group: Group = ALONE,
) -> list[RunSummary]:
    """Measure data files into directories; continue where an interrupted run stopped.

    Args:
        model_path: see `bin/analyze --help`.
        data_paths: one file, whose run stands in `output_dir`; or several, each of whose runs stands in
            `output_dir` / its name without suffix. The model is loaded once for all.
        output_dir: a path or a URL that fsspec can write (gs://, s3://); made where it is missing.
        options: what to measure.
        start: index of the first example of each file.
        limit: how many examples of each file.
        fields: the names of a record's fields.
        data_format: which kind of records, one of `data.read.FORMAT_NAMES`.
        response: "chosen" or "rejected", for records that have both.
        output_format: "jsonl" also writes the authors' JSONL (which needs the extremes, so measures
            them), next to the Parquet that makes the run resumable.
        mesh: "DxM" (examples over D devices, weights over M), or "auto" (see `runs.plan.settle_mesh`).
            One that this process's devices are too few for spans the processes of the group.
            A run may be continued on another one: its numbers are those up to rounding.
        model_options: an adapter's base, and a hub id's revision.
        say: takes the lines for the user.
        progress: show a bar on stderr.
        group: the processes that share the runs, from `processes.join`; all make this call, with the
            same arguments. Process 0 speaks for all.

    Raises:
        UserError: any bad input, in one line, before anything is computed.
        Stopped: the process was asked to stop, see `processes.stopping`.
    """
    if output_format == "jsonl":
        refuse_other_loss(options.loss)
        options = dataclasses.replace(options, extremes=True)
    # Too few devices are found before the data are read.
    devices = make_mesh(parse_mesh(mesh) or ONE_DEVICE)
    if spans_processes(devices) and group.num_processes == 1:
        raise UserError(
            f"--mesh={mesh} spans the processes of jax.distributed, which must agree on each batch: join "
            "them by jaxgrad.processes.group.join and give what it returns as `group`, or give a mesh that "
            "fits one process"
        )
    directories = run_directories(data_paths, output_dir)
    exchange = group.begin_run()
    if not group.leads:
        say = say_nothing
    date = exchange.from_leader(
        lambda: date_for(options, [recorded_date(path) for path in directories.values()])
    )
    options = dataclasses.replace(options, date=date)
    asked_runs = []
    for path, directory in directories.items():
        data = read_examples(
            path,
            start=start,
            limit=limit,
            fields=fields,
            data_format=data_format,
            response=response,
        )
        asked_runs.append(ask_run(data, directory, options, start=start, limit=limit))
    exchange.wait_for_all()  # all have looked before process 0 writes
    session = Session(
        model_path,
        options,
        mesh=mesh,
        model_options=model_options,
        progress=progress and group.leads,
        group=group,
    )
    summaries = []
    for asked in asked_runs:
        summaries.append(session.run(asked, say=say, progress=progress))
        if summaries[-1].reused:
            say(f"{asked.output_dir} holds this run already, finished: nothing to compute")
        if output_format == "jsonl" and group.leads:
            _write_jsonl(asked.output_dir, options, say)
    exchange.from_leader(lambda: True)  # nobody ends before process 0 is done
    return summaries


def _write_jsonl(
    output_dir: str | Path, options: AnalyzeOptions, say: Callable[[str], None]
) -> None:
    path = path_below(output_dir, AUTHORS_FILE)
    count = write_authors_jsonl(iter_results(output_dir), path, with_spectrum=options.spectrum)
    say(f"authors' JSONL: {path} ({count} lines)")
