"""A run in windows of consecutive examples: their batches, who measures which, and their parts on disk."""

import dataclasses
import json
import time
import zlib
from base64 import b85decode, b85encode
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from jaxgrad import stopping
from jaxgrad.agreement import await_parts, gather_work
from jaxgrad.batches import Batch, BatchShape, choose_row_shapes, plan_batches
from jaxgrad.errors import OutputError
from jaxgrad.models import LoadedModel
from jaxgrad.options import AnalyzeOptions
from jaxgrad.processes import Group
from jaxgrad.program import CompileTally, Programs
from jaxgrad.results import RunDirectory
from jaxgrad.results.rows import skipped_result
from jaxgrad.run_info import count_results, halved_line
from jaxgrad.stream import measured
from jaxgrad.tokens import TokenizedExample

# Consecutive examples that are sorted into batches together and become one part file. More would pad
# less; fewer would show results sooner.
WINDOW = 256
# Of this process's windows, those that are looked at after each batch.
_NEXT_WINDOWS = 8
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive examples, and the batches of those that can be measured."""

    tokenized: Sequence[TokenizedExample]
    batches: Sequence[Batch]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch and its place in the run: number `batch` of window `window`."""

    window: int
    batch: int
    content: Batch


def plan_windows(tokenized: Sequence[TokenizedExample], options: AnalyzeOptions) -> list[Window]:
    """The examples in windows, and each window's batches."""
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
        windows.append(Window(part, batches))
    return windows


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
    windows: Sequence[Window],
    tokenized: Sequence[TokenizedExample],
    programs: Programs,
    model: LoadedModel,
    *,
    before: CompileTally,
    say: Callable[[str], None],
    progress: bool,
    group: Group,
    name: str,
) -> dict[str, Any]:
    """Measures what is left of an open run, and marks it as finished once all processes are done.

    Args:
        store: open.
        windows: from `plan_windows` of `tokenized`.
        tokenized: all examples.
        programs: of the model.
        model: its weights.
        before: what of the programs was compiled before this run.
        say: see `run_windows`.
        progress: see there.
        group: see there.
        name: see there.

    Returns:
        The run's counts.

    Raises:
        Stopped: see there.
        UserError: see there.
    """
    if group.from_leader(f"{name}/finished", lambda: json.dumps(store.finished)) == "false":
        num_batches = run_windows(
            store,
            windows,
            programs,
            model,
            say=say,
            progress=progress,
            group=group,
            name=name,
        )
        shapes = {batch.shape for window in windows for batch in window.batches}
        work = gather_work(group, f"{name}/work", programs, before, shapes, num_batches)
        if group.leads:
            await_parts(group, store, len(windows))
            counts = count_results(tokenized, store.path, work.compiled, work.halves)
            if group.num_processes > 1:
                counts["processes"] = work.by_process
            store.finish(counts)
    return json.loads(group.from_leader(f"{name}/counts", lambda: json.dumps(store.run["counts"])))


def run_windows(
    store: RunDirectory,
    windows: Sequence[Window],
    programs: Programs,
    model: LoadedModel,
    *,
    say: Callable[[str], None],
    progress: bool,
    group: Group,
    name: str,
) -> int:
    """Measure what is left of a run, and write it; in a group this process's share.

    When it returns, all processes have recorded their batches and merged their windows. Which batches are
    done already is what process 0 finds; the rest is divided. Window w is merged by process w modulo
    their number, so no two processes write one file.

    Args:
        store: open.
        windows: from `plan_windows`.
        programs: of the model.
        model: its weights.
        say: takes the lines for the user.
        progress: show a bar on stderr, of the whole group.
        group: of which this process is one.
        name: of this run, from `group.begin_run`.

    Returns:
        How many batches this process measured in this session.

    Raises:
        Stopped: it was asked to stop, see `stopping`.
        UserError: the disk is full, or the memory is too small for one example.
    """
    plan = [
        PlannedBatch(w, b, batch)
        for w, window in enumerate(windows)
        for b, batch in enumerate(window.batches)
    ]
    text = group.from_leader(f"{name}/done", lambda: encode_flags(recorded_batches(store, plan)))
    left = [planned for planned, done in zip(plan, decode_flags(text), strict=True) if not done]
    share = _Share(store, windows, left, group, name)
    total, todo = _num_examples(plan), _num_examples(left)
    # What an earlier session did is progress, but not speed.
    bar = tqdm(
        total=total,
        initial=total - todo,
        unit="example",
        disable=not progress,
        dynamic_ncols=True,
    )

    def show() -> None:
        done = total - todo + group.add(f"{name}/examples", 0)
        stopping.note_progress(done, total)
        bar.update(done - bar.n)

    if share.batches:
        # Compiled here, where nothing is in flight that a request to stop would wait for.
        programs.memory(share.batches[0].content.shape)
    told: set[BatchShape] = set()
    with bar, stopping.finishing_batches():
        show()
        # Before the first batch that is left: windows of which only the end is missing.
        share.merge_finished_windows()
        rest = [(windows[planned.window].tokenized, planned.content) for planned in share.batches]
        results = measured(programs, model, rest, stop=stopping.requested)
        for planned, rows in zip(share.batches, results, strict=False):
            share.write(planned, rows)
            for shape, half in programs.halves.items():
                if shape not in told:
                    say(halved_line(shape, half))
                    told.add(shape)
            show()
            share.merge_complete_windows()
        share.merge_the_rest(show)
        group.gather(f"{name}/merged", "", meanwhile=show)
        show()
    return share.num_written


def _num_examples(batches: Sequence[PlannedBatch]) -> int:
    return sum(len(planned.content.members) for planned in batches)


class _Share:
    """What one process measures and merges of a run."""

    def __init__(
        self,
        store: RunDirectory,
        windows: Sequence[Window],
        left: Sequence[PlannedBatch],
        group: Group,
        name: str,
    ) -> None:
        self._store, self._windows, self._group, self._name = store, windows, group, name
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
        self._group.add(f"{self._name}/window-{planned.window}", 1)
        self._group.add(f"{self._name}/examples", len(planned.content.members))

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
                self._group.assemble(f"{self._name}/stopped")
                show()
                stopping.raise_if_requested()
            show()
            before = len(self._unmerged)
            self.merge_complete_windows()
            if len(self._unmerged) < before or not self._counted(self._unmerged[0]):
                overdue = None
                time.sleep(_POLL_SECONDS * (len(self._unmerged) == before))
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
        return not missing or self._group.add(f"{self._name}/window-{w}", 0) >= missing

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
