"""The two tables that one run writes, and their bytes; `results.columns` declares what they hold.

`examples` has one row an example of the data file, also for those that could not be measured. `matrices`
has one row a matrix of an example; an example's rows stay in the order they came in.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxgrad.results.columns import EXAMPLES, MATRICES, Column, conform, schema_of

EXAMPLES_SCHEMA = schema_of(EXAMPLES)
MATRICES_SCHEMA = schema_of(MATRICES)
_TEXTS = tuple(column.name for column in EXAMPLES if pa.types.is_string(column.type))
_MEASURED = MATRICES[1:]  # all but example_index, which `ExampleResult` has
_DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ExampleResult:
    """One example's row and its matrices' rows; the fields are the columns of the tables.

    Attributes:
        matrices: Columns of the matrices table by name, example_index excepted, all of one length:
            an array or a list, a missing integer or string as None (or NaN in a float array).
            A list column is a list of one-dimensional arrays or None, or a matrix. A column
            that is absent is null. Empty when no matrix was measured.
    """

    example_index: int
    example_id: str
    num_tokens: int
    num_prompt_tokens: int
    num_response_tokens: int
    truncated: bool
    loss: float | None
    status: Literal["ok", "skipped", "non_finite"]
    reason: str | None
    instruction: str
    response: str
    matrices: Mapping[str, np.ndarray | list] = field(default_factory=dict)


def examples_table(results: Sequence[ExampleResult]) -> pa.Table:
    """Rows of the examples table, in the order given."""
    columns = {name: [getattr(row, name) for row in results] for name in EXAMPLES_SCHEMA.names}
    for name in _TEXTS:
        columns[name] = [None if text is None else storable(text) for text in columns[name]]
    return pa.Table.from_pydict(columns, schema=EXAMPLES_SCHEMA)


def matrices_table(results: Sequence[ExampleResult]) -> pa.Table:
    """Rows of the matrices table: example by example, each example's rows in their own order.

    Raises:
        ValueError: A column no schema names, columns of different lengths, or matrices without
            layer and projection.
    """
    tables = [_matrices_of(row) for row in results if row.matrices]
    return pa.concat_tables([MATRICES_SCHEMA.empty_table(), *tables])


def _matrices_of(result: ExampleResult) -> pa.Table:
    where = f"matrices of example {result.example_index}"
    given = result.matrices
    unknown = sorted(set(given) - {column.name for column in _MEASURED})
    if unknown:
        raise ValueError(f"{where}: no such column: {', '.join(unknown)}")
    if "layer" not in given or "projection" not in given:
        raise ValueError(f"{where}: layer and projection are needed")
    count = len(given["projection"])
    arrays = [pa.array([result.example_index] * count, pa.int64())]
    for column in _MEASURED:
        values = given.get(column.name, [None] * count)
        if len(values) != count:
            raise ValueError(
                f"{where}: {column.name} has {len(values)} rows, projection has {count}"
            )
        arrays.append(_matrix_column(column, values))
    return pa.Table.from_arrays(arrays, schema=MATRICES_SCHEMA)


def _matrix_column(column: Column, values: Any) -> pa.Array:
    if column.is_list:
        lists = [None if row is None else np.asarray(row, np.float64) for row in values]
        return pa.array(lists, column.type)
    if not isinstance(values, list):
        values = np.asarray(values)
    return pa.array(values, column.type, from_pandas=column.nan_is_null)


def storable(text: str) -> str:
    """The text without what Arrow refuses."""
    # A lone surrogate (a broken JSON escape) has no UTF-8 form; one such record must not end a run.
    return text.encode("utf-8", "replace").decode("utf-8")


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables one below the other; a column that only some of them have is null in the others."""
    return pa.concat_tables(tables, promote_options="default")


def sort_by_example(table: pa.Table) -> pa.Table:
    """The rows by example_index; rows of one example keep their order."""
    order = np.argsort(table.column("example_index").to_numpy(), kind="stable")
    # One chunk: how a table was put together must not show in the bytes of its file.
    return table.take(pa.array(order)).combine_chunks()


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file; the same rows give the same bytes (nothing in them is a time)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def encode_batch(results: Sequence[ExampleResult], key: str) -> bytes:
    """One batch as bytes: SHA-256 of the key and the rest, then the two tables as Arrow streams.

    Args:
        results: The batch's examples.
        key: Which batch of which run it is; the bytes are good for that one alone.
    """
    sink = pa.BufferOutputStream()
    for table in (examples_table(results), matrices_table(results)):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    payload = sink.getvalue().to_pybytes()
    return _batch_digest(payload, key) + payload


def batch_is_whole(data: bytes, key: str) -> bool:
    """Whether `decode_batch` can read these bytes."""
    # Arrow reads a stream cut between two messages as a shorter table, so the digest has to tell.
    return _batch_digest(data[_DIGEST_SIZE:], key) == data[:_DIGEST_SIZE]


def decode_batch(data: bytes, key: str) -> tuple[pa.Table, pa.Table]:
    """The examples and matrices tables of a batch.

    Raises:
        ValueError: The bytes are not what `encode_batch` gave for this key.
    """
    if not batch_is_whole(data, key):
        raise ValueError("the batch is damaged, or not this one: its digest does not fit")
    source = pa.BufferReader(data[_DIGEST_SIZE:])
    tables = []
    for _ in range(2):
        with pa.ipc.open_stream(source) as reader:
            tables.append(reader.read_all())
    return conform(tables[0], EXAMPLES), conform(tables[1], MATRICES)


def _batch_digest(payload: bytes, key: str) -> bytes:
    return hashlib.sha256(hashlib.sha256(key.encode()).digest() + payload).digest()
