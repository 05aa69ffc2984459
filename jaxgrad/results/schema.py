"""What one run writes: a table of examples and a table of matrices, and their bytes.

The names and types of the columns are a public interface. A matrix is the gradient of one example's
loss by one weight, of shape [rows, cols] as PyTorch stores it, with singular values sigma. Losses
are in nats, so its entries, norms and sigma are in nats per unit of weight. Counts, ranks and the
condition number have no unit.

Table `examples`: one row an example of the data file, also for those that could not be measured.

| column | type | unit and definition |
|---|---|---|
| example_index | int64 | position in the data file, from 0; joins the two tables |
| example_id | string | the record's own id, or its position as text |
| num_tokens | int32 | tokens of the sequence that was measured, padding not counted |
| num_prompt_tokens | int32 | tokens of it that carry no loss |
| num_response_tokens | int32 | tokens of it that carry the loss |
| truncated | bool | the sequence was cut at max_length |
| loss | float64 | nats per response token, mean; null when not computed |
| status | string | ok, skipped (never computed) or non_finite (computed, not to be used) |
| reason | string | why the status is not ok; null when it is |
| instruction | string | the prompt's text, with the record's input appended |
| response | string | the response's text |

Table `matrices`: one row a matrix of an example; an example's rows stay in the order they came in.

| column | type | unit and definition |
|---|---|---|
| example_index | int64 | as above |
| layer | int32 | decoder layer from 0; null for lm_head |
| projection | string | q, k, v, o, gate, up, down or lm_head |
| rows, cols | int32 | shape of the weight, outputs first |
| nuclear_norm | float64 | sum of sigma |
| sigma_max, sigma_min | float64 | largest; smallest of the min(rows, cols) sigma |
| frobenius_norm | float64 | square root of the sum of squared entries |
| entry_mean | float64 | mean of the entries |
| entry_max, entry_min | float64 | largest and smallest entry; null unless asked for |
| effective_rank | float64 | exp(-sum p ln p), p = sigma / nuclear_norm; null if that is < 1e-12 |
| stable_rank | float64 | (frobenius_norm / sigma_max)^2; null for a zero gradient |
| condition_number | float64 | sigma_max / sigma at the numerical rank; null for a zero gradient |
| rank_bound | int32 | min(tokens with a gradient, rows, cols): the ceiling of the rank |
| singular_values | list<float64> | largest first, up to rank_bound of them; null unless asked for |
| partner_cosine | float64 | cosine of q and o, of k and v in the layer; null unless asked for |
| layer_cosines | list<float64> | cosines with the same projection in each measured layer; as above |

Cosines are between flattened gradients (row by row) and undefined where one of them is zero: null, and
NaN inside a list. A quantity that was not asked for, or is undefined, is null. A NaN elsewhere is a
measured NaN.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# The order inside a layer, wherever matrices are listed; lm_head comes after all layers.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")

EXAMPLES_SCHEMA = pa.schema(
    [
        ("example_index", pa.int64()),
        ("example_id", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("loss", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
    ]
)

MATRICES_SCHEMA = pa.schema(
    [
        ("example_index", pa.int64()),
        ("layer", pa.int32()),
        ("projection", pa.string()),
        ("rows", pa.int32()),
        ("cols", pa.int32()),
        ("nuclear_norm", pa.float64()),
        ("sigma_max", pa.float64()),
        ("sigma_min", pa.float64()),
        ("frobenius_norm", pa.float64()),
        ("entry_mean", pa.float64()),
        ("entry_max", pa.float64()),
        ("entry_min", pa.float64()),
        ("effective_rank", pa.float64()),
        ("stable_rank", pa.float64()),
        ("condition_number", pa.float64()),
        ("rank_bound", pa.int32()),
        # Parquet calls a list's inner field "element": the same name here survives the round trip.
        ("singular_values", pa.list_(pa.field("element", pa.float64()))),
        ("partner_cosine", pa.float64()),
        ("layer_cosines", pa.list_(pa.field("element", pa.float64()))),
    ]
)

# Where NaN means "undefined" or "not asked for". Elsewhere a NaN is a measured NaN and stays.
_NAN_IS_NULL = {
    *("layer", "rows", "cols", "rank_bound"),
    *("effective_rank", "stable_rank", "condition_number", "entry_max", "entry_min"),
    "partner_cosine",
}
_TEXTS = ("example_id", "reason", "instruction", "response")
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
    unknown = sorted(set(given) - set(MATRICES_SCHEMA.names[1:]))
    if unknown:
        raise ValueError(f"{where}: no such column: {', '.join(unknown)}")
    if "layer" not in given or "projection" not in given:
        raise ValueError(f"{where}: layer and projection are needed")
    count = len(given["projection"])
    columns = [pa.array([result.example_index] * count, pa.int64())]
    for column in MATRICES_SCHEMA.names[1:]:
        values = given.get(column, [None] * count)
        if len(values) != count:
            raise ValueError(f"{where}: {column} has {len(values)} rows, projection has {count}")
        columns.append(_matrix_column(column, values))
    return pa.Table.from_arrays(columns, schema=MATRICES_SCHEMA)


def _matrix_column(name: str, values: Any) -> pa.Array:
    kind = MATRICES_SCHEMA.field(name).type
    if pa.types.is_list(kind):
        spectra = [None if row is None else np.asarray(row, np.float64) for row in values]
        return pa.array(spectra, kind)
    if not isinstance(values, list):
        values = np.asarray(values)
    return pa.array(values, kind, from_pandas=name in _NAN_IS_NULL)


def storable(text: str) -> str:
    """The text without what Arrow refuses."""
    # A lone surrogate (a broken JSON escape) has no UTF-8 form; one such record must not end a run.
    return text.encode("utf-8", "replace").decode("utf-8")


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
    return tables[0], tables[1]


def _batch_digest(payload: bytes, key: str) -> bytes:
    return hashlib.sha256(hashlib.sha256(key.encode()).digest() + payload).digest()
