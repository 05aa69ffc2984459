"""The one file that wires the stages: examples -> tokens -> model -> gradients -> spectra -> results.

`analyze` is the stream of results in memory; `run_analysis` writes them to a directory, continues an
interrupted run, and is what `bin/analyze` calls.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from jaxgrad import stopping, windows
from jaxgrad.agreement import (
    compare_with_leader,
    fit_together,
    open_together,
)
from jaxgrad.batches import MAX_SHAPES, BatchShape, count_shapes
from jaxgrad.examples import Example, Fields, read_examples
from jaxgrad.jobs import Job, finished_before, plan_job, run_places
from jaxgrad.memory import BatchChoice, largest_shape, predict_disk
from jaxgrad.models import Checkpoint, LoadedModel, open_checkpoint
from jaxgrad.options import AnalyzeOptions
from jaxgrad.planning import (
    date_for,
    fit_batches,
    recorded_date,
    settle_mesh,
    tokenize_examples,
)
from jaxgrad.processes import ALONE, Group
from jaxgrad.program import Programs
from jaxgrad.reduction import MeasureSettings
from jaxgrad.results import ExampleResult, iter_results, write_authors_jsonl
from jaxgrad.results.layout import AUTHORS_FILE
from jaxgrad.results.rows import skipped_result
from jaxgrad.results.urls import place_below
from jaxgrad.run_info import (
    memory_line,
    memory_warnings,
    model_line,
    resident_bytes,
    session_info,
    sizes_on_disk,
    summary_lines,
)
from jaxgrad.sharding import (
    ONE_DEVICE,
    MeshShape,
    make_mesh,
    parse_mesh,
    replicated_line,
    shape_of,
)
from jaxgrad.stream import measured
from jaxgrad.tokens import TokenizedExample, tokens_digest, uses_chat
from jaxgrad.windows import complete_run, plan_windows


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended: where, how many examples of each status and reason, and what it cost."""

    output_dir: str | Path
    counts: dict[str, Any]
    reused: bool


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
    options = dataclasses.replace(options, dtype=model.dtype)
    tokenized = tokenize_examples(model.tokenizer, model.config, examples, options)
    mesh, loaded = shape_of(model.mesh), model.weight_bytes
    options, _ = fit_batches(options, model.config, tokenized, loaded=loaded, mesh=mesh)
    programs = programs or programs_for(model, options)
    for window in plan_windows(tokenized, options):
        yield from (skipped_result(item) for item in window.tokenized if not item.measurable)
        for results in measured(programs, model, [(window.tokenized, b) for b in window.batches]):
            yield from results


def programs_for(model: LoadedModel, options: AnalyzeOptions) -> Programs:
    """The programs of a loaded model, none of them compiled yet.

    Raises:
        UserError: `options.parameters` selects none of the model's weights.
    """
    return Programs(model.config, model.dtype, options.settings_for(model.config), model.mesh)


class Session:
    """One model and one set of options, for one data file after the other.

    The checkpoint is opened, the weights are read and the programs are compiled at their first use and
    kept, so that the second data file starts at once. In a group each process has a session of its own,
    which makes the same calls in the same order.
    """

    def __init__(
        self,
        model_path: str | None,
        options: AnalyzeOptions,
        *,
        mesh: str = "auto",
        progress: bool = False,
        group: Group = ALONE,
    ) -> None:
        self._model_path, self.options, self._progress = model_path, options, progress
        self._asked_mesh, self._mesh_shape = parse_mesh(mesh), ONE_DEVICE
        self._group = group
        self._programs: dict[MeasureSettings, Programs] = {}

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The model on disk, without the values of its weights."""
        return open_checkpoint(self._model_path)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices that it runs on; None for one device."""
        return make_mesh(self._mesh_shape)

    @functools.cached_property
    def model(self) -> LoadedModel:
        """The model with its weights."""
        mesh = self.mesh
        return self.checkpoint.load(self.options.dtype, mesh=mesh, progress=self._progress)

    def settle_mesh(
        self, options: AnalyzeOptions, tokenized: Sequence[TokenizedExample]
    ) -> MeshShape:
        """The mesh of a job; "auto" is decided by the first one and stays, as the loaded weights do.

        Raises:
            UserError: the model does not divide by it.
        """
        if not {"mesh", "model"} & vars(self).keys():
            config = self.checkpoint.config
            self._mesh_shape = settle_mesh(self._asked_mesh, options, config, tokenized)
        return self._mesh_shape

    def programs_for(self, options: AnalyzeOptions) -> Programs:
        """The programs of a job, kept for the next ones; a job's memory may have settled `layerwise`."""
        config = self.checkpoint.config
        settings = options.settings_for(config)
        if settings not in self._programs:
            self._programs[settings] = Programs(config, options.dtype, settings, self.mesh)
        return self._programs[settings]

    def run(self, job: Job, *, say: Callable[[str], None], progress: bool) -> RunSummary:
        """Measure a job, or what is left of it; in a group this process's share.

        A finished run that was made from these very model files is reused, and nothing is said; where
        a part of it is damaged, what that part holds is measured again.

        Args:
            job: from `plan_job`.
            say: takes the lines for the user.
            progress: show a bar on stderr.

        Raises:
            OutputError: `job.output_dir` cannot be written or holds another run.
            UserError: the model cannot be loaded, or does not fit the options or the data; or another
                process of the group was given other inputs.
            Stopped: the process was asked to stop, see `stopping`.
        """
        stopping.raise_if_requested()
        stopping.note_start()
        group, checkpoint, options = self._group, self.checkpoint, job.options
        name = group.begin_run()
        if not group.leads:
            say, progress = _say_nothing, False
        compare_with_leader(group, f"{name}/asked", job.identity)
        earlier = json.loads(
            group.from_leader(
                f"{name}/earlier", lambda: json.dumps(finished_before(job.output_dir, checkpoint))
            )
        )
        if earlier is not None:
            return RunSummary(job.output_dir, earlier, reused=True)
        config = checkpoint.config
        tokenized = tokenize_examples(checkpoint.tokenizer, config, job.data.examples, options)
        loaded = self.model.weight_bytes if "model" in vars(self) else 0
        mesh = self.settle_mesh(options, tokenized)
        options, choice = fit_together(
            group, f"{name}/choices", options, config, tokenized, loaded=loaded, mesh=mesh
        )
        planned = plan_windows(tokenized, options)
        shapes = count_shapes(batch for window in planned for batch in window.batches)
        programs = self.programs_for(options)
        before = programs.tally
        self._introduce(job, options, choice, tokenized, shapes, mesh, say)
        identity = job.identity | {
            "options": job.identity["options"]
            | {"batch_tokens": options.batch_tokens, "layerwise": options.layerwise},
            "model": {
                "weights_sha256": self.model.fingerprint,
                "config": dataclasses.asdict(checkpoint.config),
            },
            "tokens_sha256": tokens_digest(tokenized),
        }
        compare_with_leader(group, f"{name}/identity", identity)
        info = session_info(checkpoint, job.data, mesh, num_processes=group.num_processes)
        with open_together(group, f"{name}/open", job.output_dir, identity, info) as store:
            counts = complete_run(
                store,
                planned,
                tokenized,
                programs,
                self.model,
                before=before,
                say=say if group.leads else group.warn,
                progress=progress,
                group=group,
                name=name,
            )
        for line in summary_lines(counts):
            say(line)
        places = ", ".join(f"{job.output_dir}/{n}" for n in ("examples", "matrices", "run.json"))
        say(f"results: {places}")
        return RunSummary(job.output_dir, counts, reused=False)

    def _introduce(
        self,
        job: Job,
        options: AnalyzeOptions,
        choice: BatchChoice,
        tokenized: Sequence[TokenizedExample],
        shapes: Mapping[BatchShape, int],
        mesh: MeshShape,
        say: Callable[[str], None],
    ) -> None:
        """Says what will be measured and needed; compiles the largest batch's program."""
        checkpoint, programs = self.checkpoint, self.programs_for(options)
        config, settings = checkpoint.config, options.settings_for(checkpoint.config)
        if shapes:
            largest = largest_shape(config, options.dtype, settings, shapes, mesh)
            on_disk = sizes_on_disk(tokenized)
            disk = predict_disk(
                settings,
                config,
                on_disk,
                window=windows.WINDOW,
                examples_a_batch=len(on_disk) / sum(shapes.values()),
            )
            needs = programs.memory(largest.shape), largest, disk, choice, _program_bytes()
            say(memory_line(*needs, layerwise=settings.layerwise))
            warn = say if self._group.leads else self._group.warn
            for line in memory_warnings(choice):
                warn(line)
        told = replicated_line(config, mesh)
        if told is not None:
            say(told)
        chat = uses_chat(checkpoint.tokenizer, options.chat)
        several = self._group.num_processes
        say(
            f"{model_line(checkpoint, options.dtype)} on {job.data.path}: "
            f"{sum(item.measurable for item in tokenized)} of {len(tokenized)} examples, "
            f"{programs.selection.num_matrices} matrices each, protocol {options.protocol}, "
            f"{'chat template' if chat else 'plain text'}; "
            f"{len(shapes)} batch shapes (at most {MAX_SHAPES})"
            + (f"; {several} processes" if several > 1 else "")
        )


def run_analysis(
    *,
    model_path: str | None,
    data_paths: Sequence[str | Path],
    output_dir: str | Path,
    options: AnalyzeOptions = AnalyzeOptions(),
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
    output_format: Literal["parquet", "jsonl"] = "parquet",
    mesh: str = "auto",
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
        output_format: "jsonl" also writes the authors' JSONL (which needs the extremes, so measures
            them), next to the Parquet that makes the run resumable.
        mesh: "DxM" (examples over D devices, weights over M), or "auto" (see `planning.settle_mesh`).
            A run may be continued on another one: its numbers are those up to rounding.
        say: takes the lines for the user.
        progress: show a bar on stderr.
        group: the processes that share the runs, from `processes.join`; all make this call, with the
            same arguments. Process 0 speaks for all.

    Raises:
        UserError: any bad input, in one line, before anything is computed.
        Stopped: the process was asked to stop, see `stopping`.
    """
    if output_format == "jsonl":
        options = dataclasses.replace(options, extremes=True)
    make_mesh(parse_mesh(mesh) or ONE_DEVICE)  # too few devices are found before the data are read
    places = run_places(data_paths, output_dir)
    name = group.begin_run()
    if not group.leads:
        say = _say_nothing

    def chosen_date() -> str:
        return date_for(options, [recorded_date(directory) for directory in places.values()])

    options = dataclasses.replace(options, date=group.from_leader(f"{name}/date", chosen_date))
    jobs = []
    for path, directory in places.items():
        data = read_examples(path, start=start, limit=limit, fields=fields)
        jobs.append(plan_job(data, directory, options, start=start, limit=limit))
    group.gather(f"{name}/planned", "")  # all have looked before process 0 writes
    session = Session(
        model_path, options, mesh=mesh, progress=progress and group.leads, group=group
    )
    summaries = []
    for job in jobs:
        summaries.append(session.run(job, say=say, progress=progress))
        if summaries[-1].reused:
            say(f"{job.output_dir} holds this run already, finished: nothing to compute")
        if output_format == "jsonl" and group.leads:
            _write_jsonl(job.output_dir, options, say)
    group.from_leader(f"{name}/done", lambda: "done")  # nobody is before process 0
    return summaries


def _say_nothing(line: str) -> None:
    """For processes that do not lead."""


@functools.cache
def _program_bytes() -> int:
    # Once a process, before its first weights: the most memory ever had does not shrink with them.
    return resident_bytes()


def _write_jsonl(
    output_dir: str | Path, options: AnalyzeOptions, say: Callable[[str], None]
) -> None:
    path = place_below(output_dir, AUTHORS_FILE)
    count = write_authors_jsonl(iter_results(output_dir), path, with_spectrum=options.spectrum)
    say(f"authors' JSONL: {path} ({count} lines)")
