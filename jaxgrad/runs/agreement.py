"""What the processes of a group must have in common before and after they measure.

Each function is called by all of them at the same point of a run, with the run's exchange. A process on
its own agrees with itself.
"""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxgrad.data.batches import BatchShape
from jaxgrad.errors import OutputError, UserError
from jaxgrad.measure.programs import CompileTally, Programs
from jaxgrad.processes.group import Exchange, Group
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import load_run

_LOOK_SECONDS = 0.2  # between two looks at a shared folder


def compare_with_leader(exchange: Exchange, identity: Mapping[str, Any]) -> None:
    """Refuses to go on with inputs that are not process 0's.

    Raises:
        UserError: they differ; the first difference is named.
    """
    here = json.loads(json.dumps(identity))
    there = exchange.from_leader(lambda: here)
    difference = first_difference(there, here)
    if difference is not None:
        key, leaders, own = difference
        raise UserError(
            f"{key} is {_shown(own)} here and {_shown(leaders)} in process 0: give all processes the "
            "same command, data and model"
        )


def first_difference(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The dotted key at which two trees differ, and what they have there; None where they do not."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else (key, there, here)
    for name in sorted(there.keys() | here.keys()):
        inner = f"{key}.{name}" if key else name
        difference = first_difference(there.get(name), here.get(name), inner)
        if difference is not None:
            return difference
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_together(
    group: Group,
    exchange: Exchange,
    path: str | Path,
    identity: dict[str, Any],
    info: dict[str, Any],
) -> RunDirectory:
    """The run directory: process 0 begins the run or puts in order what is there, then the others open it.

    Raises:
        OutputError: see `RunDirectory.open`; or process 0's run does not show up here.
    """
    store = RunDirectory.open(path, identity, info) if group.leads else None
    exchange.from_leader(lambda: True)  # the others wait here for process 0
    if store is not None:
        return store
    until = time.monotonic() + group.patience
    while load_run(path) is None and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)  # a network's folders may lag behind
    return RunDirectory.open(path, identity, info, leads=False)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a group did in one run: its compilations, the shapes that were halved, and who did what."""

    compiled: CompileTally
    halves: dict[BatchShape, BatchShape]
    by_process: list[dict[str, Any]]


def gather_work(
    exchange: Exchange,
    programs: Programs,
    tally_at_start: CompileTally,
    shapes: Collection[BatchShape],
    num_batches: int,
) -> Work:
    """The work of all processes.

    Args:
        exchange: of the run.
        programs: this process's.
        tally_at_start: their tally before the run.
        shapes: of the run's batches.
        num_batches: that this process measured.
    """
    tally = programs.tally_since(tally_at_start)
    own = {
        "batches": num_batches,
        "compiled_shapes": tally.shapes,
        "compile_seconds": round(tally.seconds, 1),
        "halves": [
            [dataclasses.astuple(shape), half.num_examples]
            for shape, half in programs.halves.items()
            if shape in shapes
        ],
    }
    everyone = exchange.gather(own)
    halves: dict[BatchShape, BatchShape] = {}
    for work in everyone:
        for sizes, num_examples in work.pop("halves"):
            shape = BatchShape(*sizes)
            least = min(num_examples, halves.get(shape, shape).num_examples)
            halves[shape] = dataclasses.replace(shape, num_examples=least)
    compiled = CompileTally(
        sum(work["compiled_shapes"] for work in everyone),
        sum(work["compile_seconds"] for work in everyone),
    )
    return Work(compiled, halves, everyone)


def await_parts(group: Group, store: RunDirectory, num_windows: int) -> None:
    """Waits until all parts that the others have written are to be seen here.

    Raises:
        OutputError: they are not.
    """
    until = time.monotonic() + group.patience
    while store.finished_windows() != list(range(num_windows)):
        if time.monotonic() > until:
            raise OutputError(
                f"Not all windows that other processes merged show up in {store.path}. Give every process "
                "one shared --output_dir."
            )
        time.sleep(_LOOK_SECONDS)
