r"""A file of records -> examples. No tokenizer here.

`data.formats` reads the files. A record has one of two forms; other fields are ignored:

    {instruction, input?, output}           one user turn: instruction, "\n" + input if not empty
    {messages: [{role, content}, ...]}      the last turn is the assistant's: the response

A record with both forms is read by the first. The whole file is parsed, so a broken file is always found.
Records are checked only inside the slice that is measured.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgrad.data.formats import kind_of, known_formats, read_records
from jaxgrad.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: Its text; "" if it has none.
        more: The turn's other fields that a chat template may print, as the record has them:
            reasoning_content, tool_calls, name, ...
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GivenTokens:
    """The tokens of a record that was tokenized before.

    Attributes:
        token_ids: All of them.
        targets: For each token, whether its loss counts.
    """

    token_ids: tuple[int, ...]
    targets: tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        index: Position of the record in its file, from 0.
        id: 16 hex digits that depend only on messages and response: the same content has the same id at any
            position and in any file format.
        messages: The prompt's turns, without the response; empty for plain text, all of whose tokens
            are targets, and for tokens that were given.
        response: The text whose loss is measured: the content of the last turn.
        reply: The last turn in full, where it has more than its text; else None.
        template_values: What else of the record a chat template reads: tools, documents, ...
        given: The tokens, if the record has them instead of text.
    """

    index: int
    id: str
    messages: tuple[Message, ...]
    response: str
    reply: Message | None = None
    template_values: Mapping[str, Any] = field(default_factory=dict)
    given: GivenTokens | None = None

    @property
    def instruction(self) -> str:
        """The prompt as plain text: the contents of its turns, joined by newlines."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields, set by the flags --instruction_field and so on."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


@dataclass(frozen=True)
class DataSet:
    """Examples from a slice of a file.

    Attributes:
        path: The file.
        sha256: 64 hex digits over the bytes of the whole file.
        num_records: Records in the whole file.
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
        path: A file of one of `data.formats.FORMATS`. JSON is UTF-8, a byte order mark is accepted.
        start: First record, from 0.
        limit: How many records at most; None for all that follow.
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
    needed = {fields.instruction, fields.input, fields.output, "messages"}
    records = read_records(data, path, needed)
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
        raise UserError(f"{path}: the file is empty; give a {known_formats()}")
    return data


# Records -> examples


def _check_renamed_input(records: Sequence[Any], fields: Fields, path: Path) -> None:
    """Raise if --input_field is in no record: an absent input counts as empty, so a typo would not show."""
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
            f"{where} is {kind_of(record)}, not an object; write it as {{instruction, input, output}}"
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
        raise UserError(f"{what} is {kind_of(value)}, not a string; write it as text in quotes")
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
        raise UserError(f"{where} is {kind_of(turns)}, not a list; write [{{role, content}}, ...]")
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
        raise UserError(f"{where} is {kind_of(turn)}, not an object; write {{role, content}}")
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
