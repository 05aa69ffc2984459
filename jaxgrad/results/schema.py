"""The two tables of a run, and their bytes. `results.columns` declares their columns.

`examples` has one row for each example of the data file, measured or not. `matrices` has one row for each
matrix of each example; the rows of an example keep their order.
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
    """One example's row of `examples`, field by field, and its rows of `matrices`.

    Attributes:
        matrices: Column name -> values, one for each matrix: an array or a list. A missing integer or
            string is None, or NaN in a float array. A column of lists is a list of one-dimensional
            arrays or None, or a matrix. A column that is not there is null. `example_index` is not
            among them. Empty if no matrix was measured.
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
    """Rows of the matrices table, example by example.

    Raises:
        ValueError: A column is not declared, columns differ in length, or layer or projection is missing.
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
    """The text, with "?" for each character that Arrow refuses."""
    # A lone surrogate (from a broken JSON escape) has no UTF-8 form. One such record must not end a run.
    return text.encode("utf-8", "replace").decode("utf-8")


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """The rows of all tables. A column that only some tables have is null in the others' rows."""
    return pa.concat_tables(tables, promote_options="default")


def sort_by_example(table: pa.Table) -> pa.Table:
    """The rows sorted by example_index. Rows of one example keep their order."""
    order = np.argsort(table.column("example_index").to_numpy(), kind="stable")
    # One chunk, so that the bytes of the file do not depend on how the table was put together.
    return table.take(pa.array(order)).combine_chunks()


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file. The same rows give the same bytes: no time is written."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def encode_batch(results: Sequence[ExampleResult], key: str) -> bytes:
    """One batch as bytes: a SHA-256 digest, then the two tables as Arrow streams.

    Args:
        results: The batch's examples.
        key: Which batch of which run it is. The digest covers it, so the bytes fit no other batch.
    """
    sink = pa.BufferOutputStream()
    for table in (examples_table(results), matrices_table(results)):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    payload = sink.getvalue().to_pybytes()
    return _batch_digest(payload, key) + payload


def batch_is_whole(data: bytes, key: str) -> bool:
    """Whether `decode_batch` can read these bytes."""
    # Arrow reads a stream that was cut between two messages as a shorter table. The digest finds it.
    return _batch_digest(data[_DIGEST_SIZE:], key) == data[:_DIGEST_SIZE]


def decode_batch(data: bytes, key: str) -> tuple[pa.Table, pa.Table]:
    """A batch's examples and matrices tables.

    Raises:
        ValueError: The bytes are not what `encode_batch` returned for this key.
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
