"""Kinds of data files: bytes -> records, which `data.records` turns into examples.

A file is of the first kind in `FORMATS` that claims it. Content decides where it can, not the name.
A new kind is a function and an entry in that table (docs/extending.md).
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxgrad.data.tables import is_arrow, is_parquet, read_arrow, read_parquet
from jaxgrad.errors import UserError

_SEPARATORS = (",", "\t", ";", "|")
_LONGEST_HEADER = 10_000
# A file without the name .csv or .tsv is CSV if its first line has one of these.
_CSV_NAMES = {"instruction", "input", "output", "question", "answer", "response", "text"} | {
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations")
}
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
            the file is right; `data.records` checks them. Values of other fields may be left out as
            `data.tables.NOT_READ`. Raises a `UserError` that names the path if the file is broken.
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
            f"{path}: neither Parquet nor Arrow nor UTF-8 text: byte 0x{data[offset]:02x} at byte offset "
            f"{offset}; save it as UTF-8, unpacked"
        ) from None


def _refuse_one_value(text: str, path: Path) -> None:
    """Raises if the whole text is one JSON value: an indented object, a number."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    inside = [k for k, v in value.items() if isinstance(v, list)] if isinstance(value, dict) else []
    mend = f"; its field {inside[0]!r} holds a list: write that list alone" if inside else ""
    raise UserError(
        f"{path}: the top level is {kind_of(value)}, not a list of records"
        f"{mend or '; write a JSON list, or one record a line'}"
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


# CSV


def _is_csv(data: bytes, path: Path) -> bool:
    """By its name, or by a first line that names fields of records."""
    text = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"{"):
        return False
    if {".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes}:
        return True
    first_line, _, rest = text[:_LONGEST_HEADER].partition(b"\n")
    if not rest.strip():
        return False
    cells = _header(first_line.decode("utf-8", "replace").rstrip("\r"))
    return bool(_CSV_NAMES & set(cells)) and "\ufffd" not in "".join(cells)


def _header(line: str, known: Collection[str] = _CSV_NAMES) -> list[str]:
    """The cells of a header line, by the separator that gives the most known names, then the most cells."""
    return _cells(line, _separator(line, known))


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _separator(line: str, known: Collection[str]) -> str:
    def fit(separator: str) -> tuple[int, int]:
        cells = _cells(line, separator)
        return len(set(cells) & set(known)), len(cells)

    return max(_SEPARATORS, key=fit)


def _read_csv(data: bytes, path: Path, needed: Collection[str]) -> list[Any]:
    """Reads a header line and records of as many cells; every value is text."""
    text, _ = _decoded(data, path)
    if "\0" in text:
        raise UserError(f"{path}: broken CSV: it holds NUL characters; save it as UTF-8 text")
    first_line = text.partition("\n")[0].rstrip("\r")
    separator = _separator(first_line, {*needed, *_CSV_NAMES})
    longest = csv.field_size_limit(len(text) + 1)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = next(lines)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two columns are called {twice!r}; rename one of them")
        records = []
        for cells in lines:
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{path}: broken CSV: the record that ends in line {lines.line_num} has "
                    f"{len(cells)} cells, the header has {len(names)} (separator {separator!r}); "
                    "put texts with separators or line ends in quotes"
                )
            if cells:
                records.append(dict(zip(names, cells, strict=True)))
        return records
    except csv.Error as error:
        raise UserError(
            f"{path}: broken CSV: {error} (line {lines.line_num}); mend it there, or fetch it again"
        ) from None
    finally:
        csv.field_size_limit(longest)


# A file is of the first kind that claims it; JSON lines claim what is left.
FORMATS = (
    DataFormat("JSON list", _opens_list, _read_json_list),
    DataFormat("Parquet", is_parquet, read_parquet),
    DataFormat("Arrow", is_arrow, read_arrow),
    DataFormat("CSV", _is_csv, _read_csv),
    DataFormat("JSON lines", lambda data, path: True, _read_json_lines),
)
