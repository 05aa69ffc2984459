r"""Stage 1: a file of records -> examples. No tokenizer here.

A file is a JSON list, JSON lines or Parquet. Its content decides, not its name: `PAR1` opens
Parquet, `[` as the first byte that is not white space opens a JSON list, anything else is JSON
lines.

A record takes one of two forms; fields that are not named here are ignored:

    {instruction, input?, output}           one user turn: instruction, "\n" + input if not empty
    {messages: [{role, content}, ...]}      the last turn is the assistant's: the response

A record with both forms is read by its fields. JSON is parsed to the end of the file, so a broken
file is always found; the records are checked only inside the slice, because no other is measured.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxgrad.errors import UserError

ROLES = ("system", "user", "assistant")

# A few bytes of Parquet may stand for any number of rows, or unpack to any number of bytes: more than
# this is refused. (JSON is as large in memory as a small multiple of its file.)
MAX_PARQUET_CELLS = 100_000_000
MAX_PARQUET_BYTES = 2 * 2**30
_PARQUET_BATCH = 1024
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_PARQUET_MAGIC = b"PAR1"
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
class Message:
    """One turn of a conversation. `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        index: Position of the record in its file, from 0.
        id: 16 hex digits that depend on the messages and the response alone. The same content at
            another position, or in another file format, has the same id.
        messages: The prompt's turns, without the response.
        response: The text whose loss is measured. May be empty; a later stage skips it.
    """

    index: int
    id: str
    messages: tuple[Message, ...]
    response: str

    @property
    def instruction(self) -> str:
        """The prompt as plain text: the contents of its turns, one below the other."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields, as the flags --instruction_field and so on set them."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


@dataclass(frozen=True)
class DataSet:
    """A slice of a file, with what identifies the file.

    Attributes:
        path: The file.
        sha256: 64 hex digits over the bytes of the whole file.
        num_records: Records in the whole file, not in the slice.
        examples: The slice, in the file's order.
    """

    path: Path
    sha256: str
    num_records: int
    examples: tuple[Example, ...]


def read_examples(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
) -> DataSet:
    """Reads records `start` to `start + limit` of a file.

    Args:
        path: JSON list, JSON lines or Parquet. UTF-8, a byte order mark is accepted.
        start: First record, from 0.
        limit: How many records at most; None takes all that follow.
        fields: Names of the record's fields.

    Returns:
        The slice; never empty.

    Raises:
        UserError: The file is missing, unreadable, empty or broken; the slice is out of range; a
            record of the slice is not of one of the two forms.
    """
    path = Path(path)
    if start < 0:
        raise UserError(f"--start={start} is negative; records count from 0")
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} leaves no record; give 1 or more, or leave it out")
    data = _read_bytes(path)
    is_parquet = data.startswith(_PARQUET_MAGIC)
    records = _parquet(data, fields, path) if is_parquet else _json(data, path)
    if not records:
        raise UserError(f"{path}: the file holds no records; give one with at least one")
    if start >= len(records):
        raise UserError(
            f"{path}: --start={start} is beyond the end; the file has {len(records)} records, "
            f"the last one is {len(records) - 1}"
        )
    _check_renamed_input(records, fields, path)
    stop = len(records) if limit is None else min(start + limit, len(records))
    examples = tuple(_example(records[i], i, fields, path) for i in range(start, stop))
    return DataSet(path, hashlib.sha256(data).hexdigest(), len(records), examples)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name one file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    if not data.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path}: the file is empty; give a JSON list, JSON lines or Parquet")
    return data


# Files -> records


def _json(data: bytes, path: Path) -> list[Any]:
    """Parses a JSON list or JSON lines. Offsets in errors count bytes of the file."""
    base = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[base:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = base + error.start
        raise UserError(
            f"{path}: neither Parquet nor UTF-8 text: byte 0x{data[offset]:02x} at byte offset "
            f"{offset}; save it as UTF-8, unpacked"
        ) from None
    first = text.lstrip(_JSON_SPACE)[:1]
    if first != "[":
        return _json_lines(text, data, base, path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _raise_broken(error, text, base, len(data), path)


def _json_lines(text: str, data: bytes, base: int, path: Path) -> list[Any]:
    if not text.lstrip(_JSON_SPACE).startswith("{"):
        _refuse_one_value(text, path)
    records: list[Any] = []
    offset = base
    # Not `splitlines`: U+2028 and its like may stand inside a JSON string.
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


def _refuse_one_value(text: str, path: Path) -> None:
    """Raises if the whole text is one JSON value: an indented object, a number."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    raise UserError(
        f"{path}: the top level is {_kind(value)}, not a list of records; "
        "write a JSON list, or one record a line"
    )


def _raise_broken(
    error: Exception, text: str, base: int, size: int, path: Path, line: int | None = None
) -> NoReturn:
    where = "" if line is None else f" in line {line}"
    if isinstance(error, json.JSONDecodeError):
        # json counts characters; an editor or `head -c` needs bytes.
        offset = base + len(text[: error.pos].encode("utf-8"))
        # One of json's messages ends in "at" itself.
        reason = f"{error.msg.removesuffix(' at')} at byte offset {offset} of {size}{where}"
    else:
        reason = f"{str(error) or type(error).__name__} after byte offset {base} of {size}{where}"
    raise UserError(
        f"{path}: broken JSON: {reason}; mend it there, or fetch the file again if it was cut"
    ) from None


def _parquet(data: bytes, fields: Fields, path: Path) -> list[Any]:
    """Reads the columns that matter; the others (images, say) stay as names with null."""
    wanted = {fields.instruction, fields.input, fields.output, "messages"}
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # Texts stay in their dictionaries until they are counted: a page may name one a billion times.
        file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts)
        names, num_rows = file.schema_arrow.names, metadata.num_rows
        columns = [name for name in names if name in wanted]
        # Not the sizes of its columns: to ask for those ends the process where its statistics are broken.
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
            return array.indices.nbytes  # of numbers, which no record may hold as its text
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


# Records -> examples


def _check_renamed_input(records: Sequence[Any], fields: Fields, path: Path) -> None:
    """An absent input is empty, so a misspelt --input_field would pass in silence."""
    if fields.input != Fields.input and not any(
        isinstance(record, dict) and fields.input in record for record in records
    ):
        raise UserError(
            f"{path}: no record has the field {fields.input!r} that --input_field names; "
            "correct it or leave the flag out"
        )


def _example(record: Any, index: int, fields: Fields, path: Path) -> Example:
    where = f"{path}: record {index}"
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is {_kind(record)}, not an object; write it as {{instruction, input, output}}"
        )
    # A Parquet file with both forms has both columns in every row, one of them null.
    if record.get("messages") is not None and record.get(fields.output) is None:
        messages, response = _conversation(record["messages"], where)
    else:
        instruction = _field(record, fields.instruction, "--instruction_field", where)
        response = _field(record, fields.output, "--output_field", where)
        if record.get(fields.input) is not None:
            extra = _string(record[fields.input], f"{where}: field {fields.input!r}")
            instruction += f"\n{extra}" if extra else ""
        messages = (Message("user", instruction),)
    return Example(index, _content_id(messages, response), messages, response)


def _field(record: Mapping[str, Any], name: str, flag: str, where: str) -> str:
    if name not in record:
        has = ", ".join(repr(key) for key in record) or "none"
        raise UserError(
            f"{where} has no field {name!r} (its fields: {has}); "
            f"name the one that holds it with {flag}"
        )
    return _string(record[name], f"{where}: field {name!r}")


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {_kind(value)}, not a string; write it as text in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a surrogate pair, \\u{ord(value[error.start]):04x}, at character "
            f"{error.start}, which no tokenizer can read; remove it"
        ) from None
    return value


def _conversation(turns: Any, where: str) -> tuple[tuple[Message, ...], str]:
    """Splits a conversation into the prompt's turns and the response."""
    where = f"{where}: field 'messages'"
    if not isinstance(turns, list):
        raise UserError(f"{where} is {_kind(turns)}, not a list; write [{{role, content}}, ...]")
    messages = [_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]
    if not messages or messages[-1].role != "assistant":
        last = f"ends with role {messages[-1].role!r}" if messages else "is empty"
        raise UserError(f"{where} {last}; the last turn must be the assistant's: the response")
    prompt = tuple(messages[:-1])
    if not any(message.role == "user" for message in prompt):
        raise UserError(f"{where} has no user turn before the response; add the prompt")
    return prompt, messages[-1].content


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {_kind(turn)}, not an object; write {{role, content}}")
    for name in ("role", "content"):
        if name not in turn:
            has = ", ".join(repr(key) for key in turn) or "none"
            raise UserError(f"{where} has no {name!r} (its fields: {has}); write {{role, content}}")
    role = _string(turn["role"], f"{where}: 'role'")
    if role not in ROLES:
        raise UserError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
    return Message(role, _string(turn["content"], f"{where}: 'content'"))


def _content_id(messages: Sequence[Message], response: str) -> str:
    content = {"messages": [[m.role, m.content] for m in messages], "response": response}
    canonical = json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")
