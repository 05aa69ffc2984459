"""The one file that wires the stages: examples -> tokens -> model -> gradients -> spectra -> results.

`analyze` is the stream of results in memory; `run_analysis` writes them to a directory, continues an
interrupted run, and is what `bin/analyze` calls.
"""

import dataclasses
import datetime
import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from jaxgrad.batches import (
    MAX_SHAPES,
    Batch,
    batch_arrays,
    choose_row_shapes,
    count_shapes,
    plan_batches,
)
from jaxgrad.errors import UserError
from jaxgrad.examples import DataSet, Example, Fields, read_examples
from jaxgrad.models import Checkpoint, DecoderConfig, LoadedModel, open_checkpoint
from jaxgrad.options import AnalyzeOptions, batches_in_flight
from jaxgrad.program import Programs
from jaxgrad.results import ExampleResult, RunDirectory, iter_results, write_authors_jsonl
from jaxgrad.results.rows import example_results, skipped_result
from jaxgrad.results.store import load_run
from jaxgrad.run_info import (
    count_results,
    memory_line,
    model_line,
    resident_bytes,
    session_info,
    summary_lines,
)
from jaxgrad.tokens import TokenizedExample, read_date, tokenize_all, tokens_digest, uses_chat

# Consecutive examples that are sorted into batches together and become one part file. More would pad
# less; fewer would show results sooner.
WINDOW = 256
AUTHORS_FILE = "authors.jsonl"


@dataclasses.dataclass(frozen=True)
class Job:
    """A slice of a data file that is to be measured into a directory.

    Attributes:
        options: the session's; the date may be the directory's own.
        identity: what the numbers depend on and is known before a model is opened.
    """

    data: DataSet
    output_dir: Path
    options: AnalyzeOptions
    identity: dict[str, Any]


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
    tokenized = _tokenize(model.tokenizer, model.config, examples, options)
    programs = programs or programs_for(model, options)
    for window in _windows(tokenized, options):
        yield from (skipped_result(item) for item in window.tokenized if not item.measurable)
        for _, results in _measured(programs, model, [(window, b) for b in window.batches]):
            yield from results


def programs_for(model: LoadedModel, options: AnalyzeOptions) -> Programs:
    """The programs of a loaded model, none of them compiled yet.

    Raises:
        UserError: `options.parameters` selects none of the model's weights.
    """
    return Programs(model.config, model.dtype, options.settings_for(model.config))


class Session:
    """One model and one set of options, for one data file after the other.

    The checkpoint is opened, the weights are read and the programs are compiled at their first use and
    kept, so that the second data file starts at once.
    """

    def __init__(
        self, model_path: str | None, options: AnalyzeOptions, *, progress: bool = False
    ) -> None:
        self._model_path, self.options, self._progress = model_path, options, progress

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The model on disk, without the values of its weights."""
        return open_checkpoint(self._model_path)

    @functools.cached_property
    def model(self) -> LoadedModel:
        """The model with its weights."""
        return self.checkpoint.load(self.options.dtype, progress=self._progress)

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs."""
        config = self.checkpoint.config
        return Programs(config, self.options.dtype, self.options.settings_for(config))

    def run(self, job: Job, *, say: Callable[[str], None], progress: bool) -> RunSummary:
        """Measure a job, or what is left of it.

        A finished run that was made from these very model files is reused, and nothing is said.

        Args:
            job: from `plan_job`.
            say: takes the lines for the user.
            progress: show a bar on stderr.

        Raises:
            OutputError: `job.output_dir` cannot be written or holds another run.
            UserError: the model cannot be loaded, or does not fit the options or the data.
        """
        checkpoint, options = self.checkpoint, job.options
        earlier = _finished_before(job.output_dir, checkpoint)
        if earlier is not None:
            return RunSummary(job.output_dir, earlier, reused=True)
        tokenized = _tokenize(checkpoint.tokenizer, checkpoint.config, job.data.examples, options)
        windows = _windows(tokenized, options)
        shapes = count_shapes(batch for window in windows for batch in window.batches)
        programs, before = self.programs, self.programs.tally
        if shapes:
            largest = max(shapes, key=lambda s: (s.num_examples * s.num_tokens, s.num_responses))
            say(memory_line(programs.memory(largest), _program_bytes()))
        chat = uses_chat(checkpoint.tokenizer, options.chat)
        say(
            f"{model_line(checkpoint, options.dtype)} on {job.data.path}: "
            f"{sum(item.measurable for item in tokenized)} of {len(tokenized)} examples, "
            f"{programs.selection.num_matrices} matrices each, protocol {options.protocol}, "
            f"{'chat template' if chat else 'plain text'}; "
            f"{len(shapes)} batch shapes (at most {MAX_SHAPES})"
        )
        identity = job.identity | {
            "model": {
                "weights_sha256": self.model.fingerprint,
                "config": dataclasses.asdict(checkpoint.config),
            },
            "tokens_sha256": tokens_digest(tokenized),
        }
        info = session_info(checkpoint, job.data)
        with RunDirectory.open(job.output_dir, identity, info) as store:
            if not store.finished:
                _run_windows(store, windows, programs, self.model, progress)
                compiled = programs.tally_since(before)
                store.finish(count_results(tokenized, job.output_dir, compiled))
            counts = store.run["counts"]
        for line in summary_lines(counts):
            say(line)
        places = ", ".join(f"{job.output_dir}/{n}" for n in ("examples", "matrices", "run.json"))
        say(f"results: {places}")
        return RunSummary(job.output_dir, counts, reused=False)


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
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> list[RunSummary]:
    """Measure data files into directories; continue where an interrupted run stopped.

    Args:
        model_path: see `bin/analyze --help`.
        data_paths: one file, whose run stands in `output_dir`; or several, each of whose runs stands in
            `output_dir` / its name without suffix. The model is loaded once for all.
        output_dir: made where it is missing.
        options: what to measure.
        start: index of the first example of each file.
        limit: how many examples of each file.
        fields: the names of a record's fields.
        output_format: "jsonl" also writes the authors' JSONL (which needs the extremes, so measures
            them), next to the Parquet that makes the run resumable.
        say: takes the lines for the user.
        progress: show a bar on stderr.

    Raises:
        UserError: any bad input, in one line, before anything is computed.
    """
    if output_format == "jsonl":
        options = dataclasses.replace(options, extremes=True)
    output_dir = Path(output_dir)
    places = {path: output_dir / Path(path).stem for path in data_paths}
    if len(data_paths) == 1:
        places = {data_paths[0]: output_dir}
    elif len(set(places.values())) < len(data_paths):
        raise UserError(
            "--data_path: two files have the same name, and each run's directory is named after its file"
        )
    dates = [recorded_date(directory) for directory in places.values()]
    options = dataclasses.replace(options, date=date_for(options, dates))
    jobs = []
    for path, directory in places.items():
        data = read_examples(path, start=start, limit=limit, fields=fields)
        jobs.append(plan_job(data, directory, options, start=start, limit=limit))
    session = Session(model_path, options, progress=progress)
    summaries = []
    for job in jobs:
        summaries.append(session.run(job, say=say, progress=progress))
        if summaries[-1].reused:
            say(f"{job.output_dir} holds this run already, finished: nothing to compute")
        if output_format == "jsonl":
            _write_jsonl(job.output_dir, options, say)
    return summaries


def plan_job(
    data: DataSet, output_dir: Path, options: AnalyzeOptions, *, start: int, limit: int | None
) -> Job:
    """A job whose directory is there to be written, or holds this very run.

    Args:
        data: from `read_examples` with the same `start` and `limit`.
        output_dir: made when the job is run.
        options: with their date, see `date_for`.
        start: index of the first example.
        limit: how many examples at most.

    Raises:
        OutputError: the directory cannot be written or holds another run.
    """
    identity = asked_identity(options, start, limit)
    identity["data"]["sha256"] = data.sha256
    RunDirectory.check_compatible(output_dir, identity)
    RunDirectory.probe(output_dir)
    return Job(data, output_dir, options, identity)


def asked_identity(options: AnalyzeOptions, start: int, limit: int | None) -> dict[str, Any]:
    """What of a run's identity follows from its flags alone."""
    return {
        "data": {"start": start, "limit": limit},
        "options": dataclasses.asdict(options) | {"batch_tokens": options.tokens_of_a_batch},
        "window": WINDOW,
    }


def recorded_date(output_dir: Path) -> str | None:
    """The date of the run that stands in a directory; None where there is no run.

    Raises:
        OutputError: its run.json is damaged.
    """
    run = load_run(output_dir)
    return run["identity"].get("options", {}).get("date") if run else None


def date_for(options: AnalyzeOptions, recorded: Iterable[str | None]) -> str:
    """The day that chat templates print: as asked, as in the first run that is there, or today."""
    if options.date is not None:
        return read_date(options.date).isoformat()
    return next(filter(None, recorded), None) or datetime.date.today().isoformat()


@functools.cache
def _program_bytes() -> int:
    # Once a process, before its first weights: the most memory ever had does not shrink with them.
    return resident_bytes()


def _run_windows(
    store: RunDirectory,
    windows: Sequence[_Window],
    programs: Programs,
    model: LoadedModel,
    progress: bool,
) -> None:
    plan = [
        (w, b, batch) for w, window in enumerate(windows) for b, batch in enumerate(window.batches)
    ]
    done = {(w, b) for w, b, _ in plan if store.window_done(w) or store.batch_done(w, b)}
    bar = tqdm(
        total=sum(len(batch.members) for _, _, batch in plan),
        # What an earlier session did is progress, but not speed.
        initial=sum(len(batch.members) for w, b, batch in plan if (w, b) in done),
        unit="example",
        disable=not progress,
        dynamic_ncols=True,
    )
    left = [(w, b, batch) for w, b, batch in plan if (w, b) not in done]
    # Before the first batch that is left: windows of which only the end is missing.
    open_batches = Counter(w for w, _, _ in left)
    with bar:
        for w, window in enumerate(windows):
            if not open_batches[w]:
                _finish_window(store, w, window)
        measured = _measured(programs, model, [(windows[w], batch) for w, _, batch in left])
        for (w, b, batch), (_, results) in zip(left, measured, strict=True):
            store.write_batch(w, b, results)
            bar.update(len(batch.members))
            open_batches[w] -= 1
            if not open_batches[w]:
                _finish_window(store, w, windows[w])


def _finish_window(store: RunDirectory, w: int, window: _Window) -> None:
    skipped = [skipped_result(item) for item in window.tokenized if not item.measurable]
    store.finish_window(w, skipped, num_examples=len(window.tokenized))


def _measured(
    programs: Programs, model: LoadedModel, plan: Sequence[tuple[_Window, Batch]]
) -> Iterator[tuple[Batch, list[ExampleResult]]]:
    """The results of each batch in the order of the plan, with the next ones under way.

    While the caller writes a batch's results, the device works on; on a CPU two batches are in flight,
    because single-threaded LAPACK calls of one leave a core to the other's matrix products.
    """

    def measure(window: _Window, batch: Batch) -> list[ExampleResult]:
        arrays = batch_arrays(batch, window.tokenized)
        loss_B, statistics = programs.measure(model.state, batch.shape, arrays)
        members = [window.tokenized[member] for member in batch.members]
        return example_results(members, loss_B, statistics, programs.selection, model.config)

    pool = ThreadPoolExecutor(max_workers=batches_in_flight())
    try:
        pending: deque[tuple[Batch, Future[list[ExampleResult]]]] = deque()
        for window, batch in plan:
            pending.append((batch, pool.submit(measure, window, batch)))
            # One more than run, so that a thread that is done finds its next batch.
            if len(pending) > batches_in_flight():
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        # Ctrl-C does not wait for what is still in flight.
        pool.shutdown(wait=False, cancel_futures=True)


def _tokenize(
    tokenizer: Any, config: DecoderConfig, examples: Sequence[Example], options: AnalyzeOptions
) -> list[TokenizedExample]:
    if options.max_length > config.max_positions:
        raise UserError(
            f"--max_length {options.max_length} exceeds the model's {config.max_positions} "
            f"positions; give --max_length={config.max_positions} or less"
        )
    tokenized = tokenize_all(examples, tokenizer, options.protocol_for(tokenizer))
    for item in tokenized:
        # JAX would clamp such an id to the last row of the embedding, in silence.
        if item.num_tokens and item.token_ids.max() >= config.vocab_size:
            raise UserError(
                f"record {item.example.index} has token {item.token_ids.max()}, but the model has "
                f"only {config.vocab_size} tokens: the tokenizer is not this model's; copy the "
                "tokenizer's files from where the weights come from"
            )
    return tokenized


def _windows(tokenized: Sequence[TokenizedExample], options: AnalyzeOptions) -> list[_Window]:
    windows = []
    row_shapes = choose_row_shapes(tokenized, max_length=options.max_length)
    for begin in range(0, len(tokenized), WINDOW):
        part = tokenized[begin : begin + WINDOW]
        batches = plan_batches(
            part,
            batch_tokens=options.tokens_of_a_batch,
            max_length=options.max_length,
            row_shapes=row_shapes,
        )
        windows.append(_Window(part, batches))
    return windows


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


def _write_jsonl(output_dir: Path, options: AnalyzeOptions, say: Callable[[str], None]) -> None:
    path = output_dir / AUTHORS_FILE
    count = write_authors_jsonl(iter_results(output_dir), path, with_spectrum=options.spectrum)
    say(f"authors' JSONL: {path} ({count} lines)")
