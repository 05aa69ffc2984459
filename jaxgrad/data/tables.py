"""Parquet and Arrow files: bytes -> records. Only the columns that are needed are unpacked.

A small file may claim any number of rows, or unpack to any number of bytes. So both are counted before
anything becomes a Python object, and more than the limits is refused. An Arrow file is counted before its
buffers are unpacked: the sizes stand in front of them.
"""

import json
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxgrad.errors import UserError

MAX_TABLE_CELLS = 100_000_000
MAX_TABLE_BYTES = 2 * 2**30
_BATCH = 1024
_PARQUET_MAGIC = b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_END_OF_STREAM = _ARROW_STREAM + bytes(4)
_BROKEN = (pa.ArrowException, OSError, ValueError, ArithmeticError, struct.error)
_BYTES_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
_TEXT_TYPES = (*_BYTES_TYPES, pa.types.is_large_binary)
_VIEW_TYPES = (pa.types.is_string_view, pa.types.is_binary_view)
_LIST_TYPES = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_FLAT_TYPES = (pa.types.is_null, pa.types.is_primitive, pa.types.is_boolean, pa.types.is_decimal)
_JSON_TYPE: Any = getattr(pa, "JsonType", ())  # pyarrow 19
# What one value costs as a Python object, at least.
_VALUE_BYTES = 8


class _NotRead:
    """Stands for the values of a column that is not needed."""


NOT_READ: Final = _NotRead()


def is_parquet(data: bytes, path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes."""
    return data.startswith(_PARQUET_MAGIC)


def is_arrow(data: bytes, path: Path) -> bool:
    """Whether a file is Arrow, as a file or a stream, by its first bytes."""
    return data.startswith((_ARROW_FILE, _ARROW_STREAM))


def read_parquet(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """The records of a Parquet file; columns that are not needed (images, say) hold `NOT_READ`.

    Raises:
        UserError: It is broken, or beyond the limits.
    """
    rows = _Rows("Parquet", path)
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # Texts stay dictionary-encoded until they are counted: a page may repeat one a billion times.
        file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts)
        names, num_rows = file.schema_arrow.names, metadata.num_rows
        columns = [name for name in names if name in needed]
        # Not by the columns' sizes: asking for those crashes the process if their statistics are broken.
        rows.count_cells(num_rows, len(leaves))
        for batch in file.iter_batches(_BATCH, columns=columns) if columns else ():
            rows.add(batch)
    except _BROKEN as error:
        raise _broken("Parquet", data, path, str(error)) from error
    if columns and len(rows.records) != num_rows:
        said = f"it says {num_rows} rows and has {len(rows.records)}"
        raise _broken("Parquet", data, path, said)
    return rows.under(names, num_rows)


def read_arrow(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """The records of an Arrow file or stream; columns that are not needed hold `NOT_READ`.

    Raises:
        UserError: It is broken, cut, or beyond the limits.
    """
    is_file = data.startswith(_ARROW_FILE)
    # A file is a stream between two marks, with a table of contents behind it.
    stream = pa.py_buffer(data)[8 if is_file else 0 :]
    if not data.endswith(_ARROW_FILE if is_file else _END_OF_STREAM):
        raise _broken("Arrow", data, path, "its end is missing")
    rows, num_rows, num_batches = _Rows("Arrow", path), 0, 0
    try:
        for message in pa.ipc.MessageReader.open_stream(stream):
            rows.count_bytes(_packed_claims(message))
        schema = pa.ipc.open_stream(stream).schema
        columns = [i for i, name in enumerate(schema.names) if name in needed]
        options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
        for batch in pa.ipc.open_stream(stream, options=options):
            rows.count_cells(batch.num_rows, max(len(columns), 1))
            num_rows, num_batches = num_rows + batch.num_rows, num_batches + 1
            batch.validate(full=True)
            for at in range(0, batch.num_rows, _BATCH) if columns else ():
                rows.add(batch.slice(at, _BATCH))
        if is_file and pa.ipc.open_file(pa.BufferReader(data)).num_record_batches != num_batches:
            raise pa.ArrowInvalid("its table of contents names other batches than it has")
    except _BROKEN as error:
        raise _broken("Arrow", data, path, str(error)) from error
    return rows.under(schema.names, num_rows)


def table_records(
    table: pa.Table, names: Sequence[str], num_rows: int, path: Path | str
) -> list[Any]:
    """The records of a table in memory.

    Args:
        table: The columns that are needed; none if none is.
        names: Of all columns.
        num_rows: Of the table.
        path: For messages.

    Raises:
        UserError: It is beyond the limits.
    """
    rows = _Rows("Arrow", path)
    rows.count_cells(num_rows, max(table.num_columns, 1))
    for batch in table.to_batches(_BATCH):
        rows.add(batch)
    return rows.under(names, num_rows)


class _Rows:
    """Collects the records of batches, and counts what they take."""

    def __init__(self, kind: str, path: Path | str) -> None:
        self.records: list[dict[str, Any]] = []
        self._kind, self._path, self._cells, self._bytes = kind, path, 0, 0

    def count_cells(self, num_rows: int, num_columns: int) -> None:
        """Raise a `UserError` if the file has more than the limit with these."""
        self._cells += num_rows * num_columns
        if self._cells > MAX_TABLE_CELLS:
            raise self._beyond(f"{self._cells // num_columns} rows of {num_columns} columns")

    def count_bytes(self, size: int) -> None:
        """Raise a `UserError` if the file has more than the limit with these."""
        self._bytes += size
        if self._bytes > MAX_TABLE_BYTES:
            raise self._beyond(f"more than {MAX_TABLE_BYTES} bytes of text")

    def add(self, batch: pa.RecordBatch) -> None:
        """Append the records of a batch whose lengths and offsets are valid."""
        columns = []
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            try:
                self.count_bytes(_unpacked_bytes(array))
            except TypeError as error:
                raise UserError(
                    f"{self._path}: column {name!r} is of Arrow type {error}, which is not read; "
                    "save it as text, numbers or lists of objects"
                ) from None
            columns.append([_plain(value, array.type) for value in array.to_pylist()])
        names = batch.schema.names
        self.records += (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))

    def under(self, names: Sequence[str], num_rows: int) -> list[Any]:
        """All records, with all columns' names."""
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{self._path}: two columns are called {twice!r}; rename one of them")
        every = dict.fromkeys(names, NOT_READ)
        return [every | row for row in self.records or [{}] * num_rows]

    def _beyond(self, what: str) -> UserError:
        return UserError(
            f"{self._path}: the {self._kind} file holds {what}, which is refused; "
            "give a part of it, or JSON lines"
        )


def _broken(kind: str, data: bytes, path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: broken {kind} of {len(data)} bytes: {why}; write or fetch the file again"
    )


def _is_one(kind: pa.DataType, tests: Sequence[Any]) -> bool:
    return any(test(kind) for test in tests)


def _unpacked_bytes(array: pa.Array) -> int:
    """Bytes of an array with its repeated texts written out. A `TypeError` names a type of other arrays."""
    kind, places = array.type, len(array) * _VALUE_BYTES
    if isinstance(array, pa.ExtensionArray):
        return _unpacked_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        if _is_one(kind.value_type, _FLAT_TYPES):
            return places
        if not _is_one(kind.value_type, _TEXT_TYPES):
            raise TypeError(str(kind))
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return places + (pc.sum(lengths.cast(pa.int64())).as_py() or 0)
    if _is_one(kind, _VIEW_TYPES):
        # Each view is four int32; the first is the text's length.
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        return places + int(views[array.offset : array.offset + len(array), 0].sum(dtype=np.int64))
    if pa.types.is_map(kind):
        entries = array.offsets[len(array)].as_py() - array.offsets[0].as_py()
        first = array.offsets[0].as_py()
        parts = (array.keys.slice(first, entries), array.items.slice(first, entries))
        return places + sum(map(_unpacked_bytes, parts))
    if pa.types.is_struct(kind):
        return places + sum(map(_unpacked_bytes, array.flatten()))
    if _is_one(kind, _LIST_TYPES):
        return places + _unpacked_bytes(array.flatten())
    if not _is_one(kind, _TEXT_TYPES + _FLAT_TYPES):
        raise TypeError(str(kind))
    return places + array.nbytes


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A value as JSON would hold it. A struct has all keys of its column, so null is an absent key."""
    if value is None:
        return None
    if isinstance(kind, _JSON_TYPE):
        return json.loads(value)
    if pa.types.is_struct(kind):
        items = ((field.name, _plain(value[field.name], field.type)) for field in kind)
        return {name: item for name, item in items if item is not None}
    if _is_one(kind, _LIST_TYPES):
        return [_plain(item, kind.value_type) for item in value]
    if pa.types.is_map(kind):
        return {name: _plain(item, kind.item_type) for name, item in value}
    return value


# Arrow's messages. Each begins with a flatbuffer (https://arrow.apache.org/docs/format/Columnar.html).


def _packed_claims(message: pa.ipc.Message) -> int:
    """Bytes that the compressed buffers of a message say they unpack to; 0 if none is compressed."""
    fields = message.metadata.to_pybytes()
    (root,) = struct.unpack_from("<I", fields)
    header = _table(fields, root, 2)
    if message.type == "dictionary batch" and header is not None:
        header = _table(fields, header, 1)  # the batch inside it
    if "batch" not in message.type or header is None or _field(fields, header, 3) is None:
        return 0
    place, total = _field(fields, header, 2), 0
    if place is None:
        return 0
    start = place + struct.unpack_from("<I", fields, place)[0]
    (count,) = struct.unpack_from("<I", fields, start)
    for k in range(count):
        offset, length = struct.unpack_from("<qq", fields, start + 4 + 16 * k)
        if length >= 8:
            (claim,) = struct.unpack_from("<q", message.body, offset)
            total += claim if claim > 0 else length  # -1: this buffer was left as it is
    return total


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table stands; None if the table leaves it out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", data, vtable + place)[0] if place < size else 0
    return table + offset if offset else None


def _table(data: bytes, table: int, number: int) -> int | None:
    """Where the table stands that is a field of another one."""
    place = _field(data, table, number)
    return None if place is None else place + struct.unpack_from("<I", data, place)[0]
