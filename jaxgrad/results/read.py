"""Reading a run directory into pandas."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxgrad.errors import UserError
from jaxgrad.results.schema import EXAMPLES_SCHEMA, MATRICES_SCHEMA, sort_by_example
from jaxgrad.results.store import (
    journal_batches,
    load_run,
    part_path,
    read_batch,
    windows_with_parts,
)

# One dtype a column, with and without nulls: NumPy's integers and booleans change with a null.
_NULLABLE = {pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}
_SCHEMAS = {"examples": EXAMPLES_SCHEMA, "matrices": MATRICES_SCHEMA}


@dataclass(frozen=True)
class Results:
    """What was measured; `jaxgrad.results.schema` defines the columns.

    Integers but example_index have pandas' nullable `Int32`, booleans `boolean`; a null in a float
    column is NaN; singular_values holds one array or None a row.

    Attributes:
        run: The content of run.json, or where else the tables come from.
        examples: One row an example, by example_index.
        matrices: One row a matrix, by example_index, then as measured.
    """

    run: dict[str, Any]
    examples: pd.DataFrame
    matrices: pd.DataFrame


def results_of(run: dict[str, Any], examples: pa.Table, matrices: pa.Table) -> Results:
    """Two Arrow tables of the schemas as `Results`."""
    frames = [table.to_pandas(types_mapper=_NULLABLE.get) for table in (examples, matrices)]
    return Results(run, *frames)


def read_results(path: str | Path, *, allow_unfinished: bool = False) -> Results:
    """Reads a run.

    Args:
        path: The run directory.
        allow_unfinished: Take what is recorded of an unfinished run, its journal included.

    Raises:
        UserError: No run there, a run that is not finished (unless allowed), or a damaged or
            missing file.
    """
    run, windows = _open(Path(path), allow_unfinished)
    pairs = list(windows)
    examples = pa.concat_tables([EXAMPLES_SCHEMA.empty_table(), *(pair[0] for pair in pairs)])
    matrices = pa.concat_tables([MATRICES_SCHEMA.empty_table(), *(pair[1] for pair in pairs)])
    return results_of(run, examples, matrices)


def iter_results(path: str | Path, *, allow_unfinished: bool = False) -> Iterator[Results]:
    """As `read_results`, one window at a time: for runs larger than memory."""
    run, windows = _open(Path(path), allow_unfinished)
    return (results_of(run, examples, matrices) for examples, matrices in windows)


def _open(
    path: Path, allow_unfinished: bool
) -> tuple[dict[str, Any], Iterator[tuple[pa.Table, pa.Table]]]:
    """The run and its windows' tables; refuses here, not when the first window is asked for."""
    run = load_run(path)
    if run is None:
        what = "has no run.json" if path.is_dir() else "is no directory"
        raise UserError(f"{path} {what}. Give the --output_dir of an analyze command.")
    if not run["finished"] and not allow_unfinished:
        raise UserError(
            f"The run in {path} is not finished: {_progress(path)}. "
            "Run the same analyze command again: it continues from there."
        )
    # The journal before the parts. A window that is finished meanwhile is in its parts by then, so
    # reading while the run goes on misses nothing.
    journal: dict[int, list[tuple[pa.Table, pa.Table]]] = {}
    for (window, _), file in journal_batches(path).items():
        try:
            journal.setdefault(window, []).append(read_batch(file))
        except FileNotFoundError:
            continue
    parts = windows_with_parts(path)
    if run["finished"] and parts != list(range(run["windows"])):
        raise UserError(
            f"{path} lacks files: of {run['windows']} windows {len(parts)} have both parts. "
            "Copy it again, or run the analyze command with another --output_dir."
        )
    return run, _windows(path, parts, journal)


def _windows(
    path: Path, parts: list[int], journal: dict[int, list[tuple[pa.Table, pa.Table]]]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    for window in sorted({*parts, *journal}):
        if window in parts:
            yield _read_part(path, "examples", window), _read_part(path, "matrices", window)
        else:
            examples, matrices = (
                pa.concat_tables(tables) for tables in zip(*journal[window], strict=True)
            )
            yield sort_by_example(examples), sort_by_example(matrices)


def _read_part(path: Path, table: str, window: int) -> pa.Table:
    file = part_path(path, table, window)
    try:
        # No partitioning: a folder named "lr=3" above the file must not become a column.
        return pq.read_table(file, partitioning=None).cast(_SCHEMAS[table])
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{file} cannot be read: it is damaged or not ours. Copy the run again, or run the "
            "analyze command with another --output_dir."
        ) from error


def _progress(path: Path) -> str:
    windows = windows_with_parts(path)
    try:
        files = [part_path(path, "examples", window) for window in windows]
        examples = sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"A part of {path} cannot be read ({error}).") from error
    batches = sum(window not in windows for window, _ in journal_batches(path))
    return (
        f"{examples} examples in {len(windows)} finished windows and {batches} "
        f"{'batch' if batches == 1 else 'batches'} of others are recorded"
    )
