"""A run's windows: who measures which batch, and who merges a window's batches into parts on disk."""

import dataclasses
import time
import zlib
from base64 import b85decode, b85encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxgrad.checkpoints import LoadedModel
from jaxgrad.data.batches import Batch, BatchShape
from jaxgrad.errors import OutputError, UserError
from jaxgrad.measure.programs import CompileTally, Programs
from jaxgrad.measure.rows import skipped_result
from jaxgrad.measure.stream import measured
from jaxgrad.processes import stopping
from jaxgrad.processes.group import Exchange, Group
from jaxgrad.results import RunDirectory
from jaxgrad.runs.agreement import await_parts, gather_work
from jaxgrad.runs.plan import RunPlan, Window
from jaxgrad.runs.report_lines import count_results, halved_line

# Of this process's windows, those that are looked at after each batch.
_NEXT_WINDOWS = 8
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch and its number in the run: `batch` of window `window`."""

    window: int
    batch: int
    content: Batch


def divide(batches: Sequence[Batch], num_processes: int) -> list[int]:
    """The process that measures each batch.

    In the order of the plan each goes to the process with the fewest padded tokens so far, the first of
    equals, so that all are busy to the end and windows become complete one after the other.
    """
    loads, owners = [0] * num_processes, []
    for batch in batches:
        owner = loads.index(min(loads))
        loads[owner] += batch.shape.num_examples * batch.shape.num_tokens
        owners.append(owner)
    return owners


def recorded_batches(store: RunDirectory, plan: Sequence[PlannedBatch]) -> list[bool]:
    """Which batches of the plan are done, in the journal or in their windows' parts."""
    parts = {w: store.window_done(w) for w in {planned.window for planned in plan}}
    journal = store.journaled_batches()
    return [parts[p.window] or (p.window, p.batch) in journal for p in plan]


def encode_flags(flags: Sequence[bool]) -> str:
    """Yes and no as short text: a million batches are a kilobyte where they are mostly alike."""
    return b85encode(zlib.compress(bytes(flags))).decode()


def decode_flags(text: str) -> list[bool]:
    """What `encode_flags` was given."""
    return [bool(value) for value in zlib.decompress(b85decode(text))]


def complete_run(
    store: RunDirectory,
    plan: RunPlan,
    programs: Programs,
    model: LoadedModel,
    *,
    tally_at_start: CompileTally,
    say: Callable[[str], None],
    progress: bool,
    group: Group,
    exchange: Exchange,
) -> dict[str, Any]:
    """Measures what is left of an open run, and marks it as finished once all processes are done.

    Args:
        store: open.
        plan: of the run.
        programs: of the model.
        model: its weights.
        tally_at_start: what of the programs was compiled before this run.
        say: takes the lines for the user.
        progress: show a bar on stderr.
        group: the processes that share the run.
        exchange: of the run.

    Returns:
        The run's counts.

    Raises:
        Stopped: see `run_windows`.
        UserError: see `run_windows`.
    """
    if not exchange.from_leader(lambda: store.finished):
        num_batches = run_windows(
            store,
            plan.windows,
            programs,
            model,
            say=say,
            progress=progress,
            group=group,
            exchange=exchange,
        )
        work = gather_work(exchange, programs, tally_at_start, plan.shapes.keys(), num_batches)
        if group.leads:
            await_parts(group, store, len(plan.windows))
            counts = count_results(plan.tokenized, store.path, work.compiled, work.halves)
            if group.num_processes > 1:
                counts["processes"] = work.by_process
            store.finish(counts)
    return exchange.from_leader(lambda: store.run["counts"])


def run_windows(
    store: RunDirectory,
    windows: Sequence[Window],
    programs: Programs,
    model: LoadedModel,
    *,
    say: Callable[[str], None],
    progress: bool,
    group: Group,
    exchange: Exchange,
) -> int:
    """Measures what is left of a run, and writes it; in a group this process's share.

    When it returns, all processes have recorded their batches and merged their windows. Process 0 says
    which batches are done already; the rest is divided. Window w is merged by process w modulo their
    number, so no two processes write one file.

    On a mesh that spans the processes all of them compute every batch, together, and each writes its
    share. Before each batch they agree on it, so all stop after the same one.

    Args:
        store: open.
        windows: of the plan.
        programs: of the model.
        model: its weights.
        say: takes the lines for the user.
        progress: show a bar on stderr, of the whole group.
        group: the processes that share the run.
        exchange: of the run.

    Returns:
        How many batches this process measured in this session.

    Raises:
        Stopped: it was asked to stop, see `stopping`.
        UserError: the disk is full, or the memory is too small for one example.
    """
    planned_batches = [
        PlannedBatch(w, b, batch)
        for w, window in enumerate(windows)
        for b, batch in enumerate(window.batches)
    ]
    text = exchange.from_leader(lambda: encode_flags(recorded_batches(store, planned_batches)))
    is_done = decode_flags(text)
    left = [p for p, done in zip(planned_batches, is_done, strict=True) if not done]
    share = _Share(store, windows, left, group, exchange)
    total, todo = _num_examples(planned_batches), _num_examples(left)
    # What an earlier session did is progress, but not speed.
    bar = tqdm(
        total=total,
        initial=total - todo,
        unit="example",
        disable=not progress,
        dynamic_ncols=True,
    )

    def show() -> None:
        done = total - todo + exchange.count("examples")
        stopping.note_progress(done, total)
        bar.update(done - bar.n)

    mine = {id(planned) for planned in share.batches}
    computed = left if programs.spans else share.batches
    begin = together(programs, exchange) if programs.spans else _always
    if computed:
        # Compiled here, where nothing is in flight that a request to stop would wait for.
        programs.memory(computed[0].content.shape)
    told: set[BatchShape] = set()
    with bar, stopping.finishing_batches():
        show()
        # First the windows whose batches are all recorded but not merged.
        share.merge_finished_windows()
        rest = [(windows[planned.window].tokenized, planned.content) for planned in computed]
        stop = _never if programs.spans else stopping.requested
        results = measured(programs, model, rest, stop=stop, begin=begin)
        if programs.spans:
            results = _until_others_end(results, group)
        for planned, rows in zip(computed, results, strict=False):
            if id(planned) in mine:
                share.write(planned, rows)
            for shape, half in programs.halves.items():
                if shape not in told:
                    say(halved_line(shape, half))
                    told.add(shape)
            show()
            share.merge_complete_windows()
        share.merge_the_rest(show)
        exchange.wait_for_all(meanwhile=show)
        show()
    return share.num_written


def together(programs: Programs, exchange: Exchange) -> Callable[[BatchShape], bool]:
    """What the processes of a mesh that spans them do before each batch: they agree on it.

    They come to its program at the same time, so none waits in a collective while another compiles.

    Returns:
        A function of the batch's shape: whether to compute it. It is false in all processes alike, once
        one was asked to stop or has ended.

    Raises:
        UserError: (the function) the processes would run different programs.
    """

    def begin(shape: BatchShape) -> bool:
        program = programs.memory(shape).shape  # compiled; a smaller one where it takes too much
        sizes = [program.num_examples, program.num_tokens, program.num_responses]
        votes = exchange.vote([stopping.requested(), sizes])
        if votes is None or any(asked for asked, _ in votes):
            return False
        for process, (_, theirs) in enumerate(votes):
            if theirs != sizes:
                raise UserError(
                    f"a batch of {shape.num_examples} x {shape.num_tokens} tokens is measured as "
                    f"{sizes[0]} x {sizes[1]} here and as {theirs[0]} x {theirs[1]} in process {process}, "
                    "for want of memory; give a smaller --batch_tokens and another --output_dir"
                )
        return True

    return begin


def _always(shape: BatchShape) -> bool:
    return True


def _never() -> bool:
    return False


def _until_others_end(results: Iterator[Any], group: Group) -> Iterator[Any]:
    """The results. A program fails where another process has ended: then this one ends, too."""
    try:
        yield from results
    except jax.errors.JaxRuntimeError:
        group.await_verdict()
        raise


def _num_examples(batches: Sequence[PlannedBatch]) -> int:
    return sum(len(planned.content.members) for planned in batches)


def _window_counter(window: int) -> str:
    return f"batches of window {window}"


class _Share:
    """What one process measures and merges of a run."""

    def __init__(
        self,
        store: RunDirectory,
        windows: Sequence[Window],
        left: Sequence[PlannedBatch],
        group: Group,
        exchange: Exchange,
    ) -> None:
        self._store, self._windows, self._group, self._exchange = store, windows, group, exchange
        owners = divide([planned.content for planned in left], group.num_processes)
        self.batches = [
            p for p, owner in zip(left, owners, strict=True) if owner == group.process_id
        ]
        self.num_written = 0
        # How many batches a window still lacks; all of them are this session's.
        self._missing = Counter(planned.window for planned in left)
        self._unmerged = [
            w for w in range(len(windows)) if w % group.num_processes == group.process_id
        ]

    def write(self, planned: PlannedBatch, rows: Sequence[Any]) -> None:
        """Records one batch, and lets the group know."""
        self._store.write_batch(planned.window, planned.batch, rows)
        self.num_written += 1
        self._exchange.count(_window_counter(planned.window), 1)
        self._exchange.count("examples", len(planned.content.members))

    def merge_finished_windows(self) -> None:
        """Merges those windows that lacked no batch when the session began."""
        for w in [w for w in self._unmerged if not self._missing[w]]:
            self._merge(w)

    def merge_complete_windows(self) -> None:
        """Merges what has become complete of the next windows."""
        for w in self._unmerged[:_NEXT_WINDOWS]:
            if self._counted(w) and self._visible(w):
                self._merge(w)

    def merge_the_rest(self, show: Callable[[], None]) -> None:
        """Merges all of this process's windows, and waits for the batches of others.

        Raises:
            Stopped: the group was asked to stop meanwhile, or before all batches were measured.
            OutputError: what another process wrote does not show up here.
        """
        overdue = None
        while self._unmerged or self.num_written < len(self.batches):
            if stopping.requested():
                # All batches in flight are counted when all are here.
                self._exchange.await_stop()
                show()
                stopping.raise_if_requested()
            show()
            num_unmerged = len(self._unmerged)
            self.merge_complete_windows()
            if len(self._unmerged) < num_unmerged or not self._counted(self._unmerged[0]):
                overdue = None
                time.sleep(_POLL_SECONDS * (len(self._unmerged) == num_unmerged))
                continue
            overdue = overdue or time.monotonic() + self._group.patience
            if time.monotonic() > overdue:
                raise OutputError(
                    f"Batches of window {self._unmerged[0]} that other processes wrote do not show up "
                    f"in {self._store.path}/journal. Give every process one shared --output_dir."
                )
            time.sleep(_POLL_SECONDS)

    def _counted(self, w: int) -> bool:
        missing = self._missing[w]
        return not missing or self._exchange.count(_window_counter(w)) >= missing

    def _visible(self, w: int) -> bool:
        """Whether this host sees all of the window's batches; a network's folders may lag behind."""
        if self._group.num_processes == 1 or self._store.window_done(w):
            return True
        journal = self._store.journaled_batches()
        return all((w, b) in journal for b in range(len(self._windows[w].batches)))

    def _merge(self, w: int) -> None:
        window = self._windows[w]
        skipped = [skipped_result(item) for item in window.tokenized if not item.measurable]
        self._store.finish_window(w, skipped, num_examples=len(window.tokenized))
        self._unmerged.remove(w)
