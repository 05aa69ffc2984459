"""Kinds of data files: bytes -> records, which `data.examples` turns into examples.

A file is of the first kind in `FORMATS` that claims it. Content decides where it can, not the name.
A new kind is a function and an entry in that table (docs/extending.md).
"""

import codecs
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxgrad.errors import UserError

# A small Parquet file may claim any number of rows, or unpack to any number of bytes: more than this is
# refused. (JSON needs only a small multiple of its file in memory.)
MAX_PARQUET_CELLS = 100_000_000
MAX_PARQUET_BYTES = 2 * 2**30
_PARQUET_BATCH = 1024
_PARQUET_MAGIC = b"PAR1"
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_JSON_SPACE = " \t\r\n"
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class DataFormat:
    """A kind of data file.

    Attributes:
        name: In messages.
        claims: (bytes of the file, its path) -> whether it is of this kind.
        read: (bytes, path, names of the fields that are needed) -> the file's records: dictionaries, if
            the file is right; `data.examples` checks them. Values of other fields may be left out as
            None. Raises a `UserError` that names the path if the file is broken.
    """

    name: str
    claims: Callable[[bytes, Path], bool]
    read: Callable[[bytes, Path, Collection[str]], list[Any]]


def read_records(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """The records of a file.

    Args:
        data: Its bytes.
        path: Where it is.
        needed: Names of the fields whose values are needed.

    Raises:
        UserError: The file is broken.
    """
    return next(kind for kind in FORMATS if kind.claims(data, path)).read(data, path, needed)


def known_formats() -> str:
    """The kinds of files, for messages."""
    *names, last = (kind.name for kind in FORMATS)
    return f"{', '.join(names)} or {last}"


def kind_of(value: Any) -> str:
    """What a value of JSON is called in messages."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


# JSON


def _opens_list(data: bytes, path: Path) -> bool:
    return data.removeprefix(codecs.BOM_UTF8).lstrip(_JSON_SPACE.encode()).startswith(b"[")


def _read_json_list(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """Parses to the end of the file, so a broken one is always found."""
    text, base = _decoded(data, path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _raise_broken(error, text, base, len(data), path)


def _read_json_lines(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    text, base = _decoded(data, path)
    if not text.lstrip(_JSON_SPACE).startswith("{"):
        _refuse_one_value(text, path)
    records: list[Any] = []
    offset = base
    # Not `splitlines`, which also splits at U+2028 and others that a JSON string may contain.
    for number, line in enumerate(data[base:].split(b"\n"), start=1):
        line_text = line.decode("utf-8")
        if line_text.strip(_JSON_SPACE):
            try:
                records.append(json.loads(line_text))
            except (ValueError, RecursionError) as error:
                if not records:
                    _refuse_one_value(text, path)
                _raise_broken(error, line_text, offset, len(data), path, line=number)
        offset += len(line) + 1
    return records


def _decoded(data: bytes, path: Path) -> tuple[str, int]:
    """A file's text, and at which of its bytes the text begins: errors count bytes of the file."""
    base = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[base:].decode("utf-8"), base
    except UnicodeDecodeError as error:
        offset = base + error.start
        raise UserError(
            f"{path}: neither Parquet nor UTF-8 text: byte 0x{data[offset]:02x} at byte offset "
            f"{offset}; save it as UTF-8, unpacked"
        ) from None


def _refuse_one_value(text: str, path: Path) -> None:
    """Raises if the whole text is one JSON value: an indented object, a number."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    raise UserError(
        f"{path}: the top level is {kind_of(value)}, not a list of records; "
        "write a JSON list, or one record a line"
    )


def _raise_broken(
    error: Exception, text: str, base: int, size: int, path: Path, line: int | None = None
) -> NoReturn:
    where = "" if line is None else f" in line {line}"
    if isinstance(error, json.JSONDecodeError):
        # json counts characters; an editor or `head -c` needs bytes.
        offset = base + len(text[: error.pos].encode("utf-8"))
        # One of json's messages already ends in "at".
        reason = f"{error.msg.removesuffix(' at')} at byte offset {offset} of {size}{where}"
    else:
        reason = f"{str(error) or type(error).__name__} after byte offset {base} of {size}{where}"
    raise UserError(
        f"{path}: broken JSON: {reason}; mend it there, or fetch the file again if it was cut"
    ) from None


# Parquet


def _is_parquet(data: bytes, path: Path) -> bool:
    return data.startswith(_PARQUET_MAGIC)


def _read_parquet(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """Reads the columns that are needed; the others (images, say) stay as names with null."""
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # Texts stay dictionary-encoded until they are counted: a page may repeat one a billion times.
        file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts)
        names, num_rows = file.schema_arrow.names, metadata.num_rows
        columns = [name for name in names if name in needed]
        # Not by the columns' sizes: asking for those crashes the process if their statistics are broken.
        if num_rows * len(leaves) > MAX_PARQUET_CELLS:
            raise _bomb(f"{num_rows} rows of {len(leaves)} columns", path)
        rows: list[dict[str, Any]] = []
        size = 0
        for batch in file.iter_batches(_PARQUET_BATCH, columns=columns) if columns else ():
            size += sum(map(_unpacked_bytes, batch.columns))
            if size > MAX_PARQUET_BYTES:
                raise _bomb(f"more than {MAX_PARQUET_BYTES} bytes of text", path)
            rows += batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path}: broken Parquet of {len(data)} bytes: {error}; write or fetch the file again"
        ) from error
    if columns and len(rows) != num_rows:
        raise UserError(
            f"{path}: broken Parquet of {len(data)} bytes: it says {num_rows} rows and has "
            f"{len(rows)}; write or fetch the file again"
        )
    return [dict.fromkeys(names) | row for row in rows or [{}] * num_rows]


def _unpacked_bytes(array: pa.Array) -> int:
    """Bytes of an array with its dictionaries written out."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        if not any(is_text(kind.value_type) for is_text in _TEXT_TYPES):
            return array.indices.nbytes  # numbers, which are refused as text later
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return pc.sum(lengths.cast(pa.int64())).as_py() or 0
    if pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inside = array.flatten()
        return sum(map(_unpacked_bytes, inside if isinstance(inside, list) else [inside]))
    return array.nbytes


def _bomb(what: str, path: Path) -> UserError:
    return UserError(
        f"{path}: the Parquet file holds {what}, which is refused; give a part of it, or JSON lines"
    )


# A file is of the first kind that claims it; JSON lines claim what is left.
FORMATS = (
    DataFormat("JSON list", _opens_list, _read_json_list),
    DataFormat("Parquet", _is_parquet, _read_parquet),
    DataFormat("JSON lines", lambda data, path: True, _read_json_lines),
)
