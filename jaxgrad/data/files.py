"""Where records lie: a file, a compressed file, a directory, a set of the hub -> the records of a slice.

| --data_path | fingerprint |
|---|---|
| a file, also `.gz` and `.zst` | sha256 over its bytes, as they are on disk |
| a directory that `datasets` saved, or numbered parts | sha256 over its parts' names and sha256, in order |
| hf:ORG/NAME:SPLIT | sha256 over the slice's records, the columns that are read, as JSON |
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa

from jaxgrad.data.formats import known_formats, read_records
from jaxgrad.data.hub import HUB_MARK, read_hub_set
from jaxgrad.data.tables import NOT_READ, table_records
from jaxgrad.errors import UserError
from jaxgrad.paths import expanded

MAX_UNPACKED_BYTES = 2 * 2**30
_CODECS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))
# Files of other kinds that people bring, by how they begin.
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive (or an Excel file)", "unpack it, or save it as CSV"),
    (b"BZh", "a bzip2 file", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "an xz file", "unpack it with unxz"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"\x89HDF", "an HDF5 file", "save the records as JSON lines or Parquet"),
    (b"FEA1", "a Feather file of version 1", "save it as Parquet"),
    (b"\x80\x04", "a Python pickle, which can run code", "save the records as JSON lines"),
    (b"\x80\x05", "a Python pickle, which can run code", "save the records as JSON lines"),
)
_CHUNK = 2**20
_SPLITS, _STATE = "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class OpenedRecords:
    """The records of a slice, and what is known of all.

    Attributes:
        path: Where they come from, for messages.
        sha256: The fingerprint, see the module's docstring.
        num_records: Of the whole.
        records: Those of the slice: dictionaries, if the file is right.
        names: Of all fields that a record has.
    """

    path: Path | str
    sha256: str
    num_records: int
    records: Sequence[Any]
    names: Collection[str]


def open_records(
    path: str | os.PathLike[str], needed: Collection[str], start: int, limit: int | None
) -> OpenedRecords:
    """Reads records `start` to `start + limit`; none if the whole has fewer.

    Args:
        path: A file, a directory, or hf:ORG/NAME:SPLIT.
        needed: Names of the fields whose values are needed.
        start: First record, from 0.
        limit: How many at most; None for all that follow.

    Raises:
        UserError: They cannot be read; the message says how to mend it.
    """
    if os.fspath(path).startswith(HUB_MARK):
        name = os.fspath(path)
        found = read_hub_set(name, needed, start, limit)
        records = table_records(found.table, found.names, found.num_rows, name)
        digest = _records_digest(records)
        return OpenedRecords(name, digest, found.num_records, records, found.names)
    path = Path(expanded(os.fspath(path)))
    if path.is_dir():
        return _open_directory(path, needed, start, limit)
    data = _read_bytes(path)
    records = read_records(unpacked(data, path), path, needed)
    digest = hashlib.sha256(data).hexdigest()
    stop = None if limit is None else start + limit
    return OpenedRecords(path, digest, len(records), records[start:stop], _names(records))


def run_name(path: str | os.PathLike[str]) -> str:
    """What a run's directory is called after: a file's name without suffixes, or NAME-CONFIG-SPLIT."""
    text = os.fspath(path)
    if text.startswith(HUB_MARK):
        return re.sub(r"[^\w.-]+", "-", text.partition("/")[2])
    name = Path(text)
    is_packed = name.suffix.lower() in (".gz", ".zst")
    return Path(name.stem).stem if is_packed else name.stem


def unpacked(data: bytes, path: Path) -> bytes:
    """The bytes of a file, unpacked if they are compressed. Content decides, not the name.

    Raises:
        UserError: The file is empty, broken, beyond the limit, or of a kind that is not read.
    """
    codec = next((name for magic, name in _CODECS if data.startswith(magic)), None)
    if codec is not None:
        size = 0
        try:
            # Twice: once to count, so that a bomb never stands in memory.
            with pa.CompressedInputStream(pa.BufferReader(data), codec) as stream:
                while chunk := len(stream.read(_CHUNK)):
                    size += chunk
                    if size > MAX_UNPACKED_BYTES:
                        raise UserError(
                            f"{path}: unpacks to more than {MAX_UNPACKED_BYTES} bytes, which is refused; "
                            "give a part of it, or unpack it"
                        )
            with pa.CompressedInputStream(pa.BufferReader(data), codec) as stream:
                data = stream.read(size)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path}: broken {codec} of {len(data)} bytes: {error}; write or fetch the file again"
            ) from None
    for magic, what, mend in _OTHER_KINDS:
        if data.startswith(magic):
            raise UserError(f"{path}: is {what}, which is not read; {mend}")
    if not data.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path}: the file is empty; give a {known_formats()}")
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; check the path (a set of the hub is hf:ORG/NAME:SPLIT)"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); check the file") from error


def _names(records: Iterable[Any]) -> set[str]:
    return {name for record in records if isinstance(record, dict) for name in record}


def _records_digest(records: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for record in records:
        read = {name: value for name, value in record.items() if value is not NOT_READ}
        text = json.dumps(read, sort_keys=True, separators=(",", ":"), default=repr)
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


# Directories


def _open_directory(
    path: Path, needed: Collection[str], start: int, limit: int | None
) -> OpenedRecords:
    """The records of a directory's parts, one part after the other; only the slice's are kept."""
    columns: list[str] | None = None
    if (path / _SPLITS).exists():
        splits = sorted(part.name for part in path.iterdir() if (part / _STATE).exists())
        first = splits[0] if splits else "SPLIT"
        raise UserError(
            f"{path}: holds the splits {', '.join(splits) or '(none)'}; name one: {path / first}"
        )
    if (path / _STATE).exists():
        parts, columns = _saved_parts(path)
    else:
        parts = _numbered_parts(path)
    stop = None if limit is None else start + limit
    kept: list[Any] = []
    names: set[str] = set()
    digest, num_records = hashlib.sha256(), 0
    for part in parts:
        data = _read_bytes(part)
        digest.update(f"{part.name} {hashlib.sha256(data).hexdigest()}\n".encode())
        records = read_records(unpacked(data, part), part, needed)
        if columns is not None:
            records = [_shown(record, columns) for record in records]
        names |= _names(records)
        begin = max(start - num_records, 0)
        kept += records[begin : None if stop is None else max(stop - num_records, 0)]
        num_records += len(records)
    return OpenedRecords(path, digest.hexdigest(), num_records, kept, names)


def _shown(record: Any, columns: Collection[str]) -> Any:
    """A record with these columns alone."""
    if not isinstance(record, dict):
        return record
    return {name: value for name, value in record.items() if name in columns}


def _saved_parts(path: Path) -> tuple[list[Path], list[str] | None]:
    """The files of a directory that `datasets` saved, and the columns that it shows; None for all."""
    try:
        state = json.loads((path / _STATE).read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        columns = state.get("_format_columns")
        has_indices = state.get("_indices_data_files") or state.get("_indices_files")
        if not isinstance(columns, list | None):
            raise TypeError("_format_columns is no list")
        if not all(isinstance(name, str) for name in [*names, *(columns or [])]):
            raise TypeError("a name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path / _STATE}: is not as datasets' save_to_disk writes it "
            f"({type(error).__name__}: {error}); save the set again"
        ) from error
    if has_indices:
        raise UserError(
            f"{path}: holds an order of its rows apart from them; call flatten_indices() and save it again"
        )
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{path / _STATE}: names no files of this directory; save the set again")
    return [path / name for name in names], columns


def _numbered_parts(path: Path) -> list[Path]:
    """The files of a directory whose names differ in a number only, with none missing."""
    try:
        entries = sorted(entry.name for entry in path.iterdir() if entry.name[0] not in "._")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    names = [name for name in entries if not name.lower().startswith(("readme", "license"))]
    prefix = _common_start(names)
    found = [re.fullmatch(r"(\d+)((?:-of-(\d+))?\D.*|)", name[len(prefix) :]) for name in names]
    matches = [match for match in found if match is not None]
    if not names or len(matches) < len(names) or len({match[2] for match in matches}) > 1:
        such = f", such as {path / names[0]}" if names else ""
        raise UserError(
            f"{path}: is a directory; name one file in it{such} (the numbered parts of one set "
            "are read, too, if nothing else is in their directory)"
        )
    numbers = {int(match[1]): name for match, name in zip(matches, names, strict=True)}
    total = int(matches[0][3]) if matches[0][3] else max(len(numbers), max(numbers))
    first = 0 if 0 in numbers else 1
    missing = sorted(set(range(first, first + total)) - numbers.keys())
    if missing or len(numbers) != len(names) or len(numbers) != total:
        said = (
            f"part {missing[0]} of {prefix}* is missing" if missing else "two parts have a number"
        )
        raise UserError(f"{path}: {said}; fetch all parts, or name one file")
    return [path / numbers[k] for k in sorted(numbers)]


def _common_start(names: Sequence[str]) -> str:
    """What stands before the number in all names."""
    if not names:
        return ""
    if len(names) == 1:
        return re.split(r"\d+(?=-of-\d)", names[0])[0]
    pairs = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in pairs).rstrip("0123456789")
