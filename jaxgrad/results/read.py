"""Reading a run directory into pandas."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxgrad.errors import UserError
from jaxgrad.results.columns import conform
from jaxgrad.results.layout import (
    TABLES,
    finished_windows,
    journal_batches,
    part_name,
    read_batch,
    read_window,
    stored_run,
)
from jaxgrad.results.schema import EXAMPLES_SCHEMA, MATRICES_SCHEMA, joined, sort_by_example
from jaxgrad.results.storage import Storage, open_storage

# A column has the same dtype with and without nulls. NumPy's integers and booleans have no null.
_NULLABLE = {pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}


@dataclass(frozen=True)
class Results:
    """What was measured. `jaxgrad.results.columns` defines the columns.

    | column | dtype | null |
    |---|---|---|
    | example_index | int64 | never |
    | other integers | pandas' nullable `Int32` | `pd.NA` |
    | booleans | pandas' nullable `boolean` | `pd.NA` |
    | floats | float64 | NaN |
    | lists | object: one array for each row | None |
    | texts | as pandas reads texts | None or NaN |

    A column that the files lack is null: an earlier version wrote them. A column that this version does not
    know is kept.

    Attributes:
        run: The content of run.json, or what is known of the origin of other tables.
        examples: One row for each example, sorted by example_index.
        matrices: One row for each matrix, sorted by example_index, then in the order of measuring.
    """

    run: dict[str, Any]
    examples: pd.DataFrame
    matrices: pd.DataFrame


def results_of(run: dict[str, Any], examples: pa.Table, matrices: pa.Table) -> Results:
    """The two Arrow tables as `Results`."""
    frames = [table.to_pandas(types_mapper=_NULLABLE.get) for table in (examples, matrices)]
    return Results(run, *frames)


def read_results(path: str | Path, *, allow_unfinished: bool = False) -> Results:
    """Reads a run. Every file is checked against its checksum.

    Args:
        path: The run directory, or its URL.
        allow_unfinished: Of an unfinished run, read what is recorded so far.

    Raises:
        UserError: There is no run, it is not finished (unless allowed), or a file is damaged or missing.
    """
    run, windows = _open(path, allow_unfinished)
    pairs = list(windows)
    examples = joined([EXAMPLES_SCHEMA.empty_table(), *(pair[0] for pair in pairs)])
    matrices = joined([MATRICES_SCHEMA.empty_table(), *(pair[1] for pair in pairs)])
    return results_of(run, examples, matrices)


def iter_results(path: str | Path, *, allow_unfinished: bool = False) -> Iterator[Results]:
    """As `read_results`, but one window at a time: for runs larger than memory."""
    run, windows = _open(path, allow_unfinished)
    return (results_of(run, examples, matrices) for examples, matrices in windows)


_Tables = tuple[pa.Table, pa.Table]


def _open(path: str | Path, allow_unfinished: bool) -> tuple[dict[str, Any], Iterator[_Tables]]:
    """The run and its windows' tables. Refuses at once, not when the first window is read."""
    storage = open_storage(path)
    run = stored_run(storage)
    if run is None:
        what = "has no run.json" if storage.is_there() else "is no directory"
        raise UserError(f"{path} {what}. Give the --output_dir of an analyze command.")
    if not run["finished"] and not allow_unfinished:
        raise UserError(
            f"The run in {path} is not finished: {_progress(storage, run)}. "
            "Run the same analyze command again: it continues from there."
        )
    if run["finished"]:
        return run, _windows(storage, run, set(range(run["windows"])), {})
    # The journal before the parts: a window that is finished meanwhile leaves the journal for its parts.
    # So reading while the run goes on misses nothing.
    journal: dict[int, list[_Tables]] = {}
    for window, batch in journal_batches(storage):
        try:
            tables = read_batch(storage, run["identity"], window, batch)
        except FileNotFoundError:
            continue
        journal.setdefault(window, []).append(tables)
    return run, _windows(storage, run, set(finished_windows(storage)), journal)


def _windows(
    storage: Storage, run: dict[str, Any], done: set[int], journal: dict[int, list[_Tables]]
) -> Iterator[_Tables]:
    for window in sorted(done | set(journal)):
        if window in done:
            yield _read_window(storage, run, window)
        else:
            examples, matrices = (joined(tables) for tables in zip(*journal[window], strict=True))
            yield sort_by_example(examples), sort_by_example(matrices)


def _read_window(storage: Storage, run: dict[str, Any], window: int) -> _Tables:
    parts, damage = read_window(storage, run["identity"], window)
    if damage:
        raise UserError(
            f"{storage.describe(damage[0].name)} {damage[0].reason}. Run the same analyze command again: "
            "it sets the file aside and computes its window again."
        )
    tables = []
    for table, columns in TABLES.items():
        try:
            tables.append(conform(pq.read_table(pa.BufferReader(parts[table])), columns))
        except (pa.ArrowException, ValueError) as error:
            # Its checksum fits, so another version of Arrow or of this program wrote it.
            raise UserError(
                f"{storage.describe(part_name(table, window))} is whole but cannot be read here "
                f"({error}). Read it with the versions that run.json names."
            ) from error
    return tables[0], tables[1]


def _progress(storage: Storage, run: dict[str, Any]) -> str:
    windows = finished_windows(storage)
    examples = sum(_read_window(storage, run, window)[0].num_rows for window in windows)
    batches = sum(window not in windows for window, _ in journal_batches(storage))
    return (
        f"{examples} examples in {len(windows)} finished windows and {batches} "
        f"{'batch' if batches == 1 else 'batches'} of others are recorded"
    )
