"""Files, directories and hub sets of records -> examples. No tokenizer here.

`data.files` gives the records, `data.records` says what each kind of them holds. All records of a slice are
of one kind; only the two that were always read, Alpaca's and messages, may stand side by side. A field that
no kind reads is data about the record, such as its source: it is counted and named, once.

A whole file is parsed, so that a broken one is always found. Records are checked only inside the slice that
is measured.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgrad.data.examples import Example, Fields
from jaxgrad.data.files import open_records
from jaxgrad.data.formats import kind_of
from jaxgrad.data.record import RESPONSE_NAMES, MissingFieldError, Parts, Record, RecordKind
from jaxgrad.data.records import (
    ALPACA,
    KINDS,
    MESSAGES,
    PREFERENCE,
    QUESTIONS,
    needed_fields,
    template_values,
    with_system,
)
from jaxgrad.data.tables import NOT_READ
from jaxgrad.errors import UserError

AUTO = "auto"
FORMAT_NAMES = (AUTO, *(kind.name for kind in KINDS))
# Kinds that were always read.
_OLDEST = {ALPACA, MESSAGES}
_MOST_NAMES = 12
# What other files call a response.
_ANSWERS = ("answer", "response", "completion", "solution", "output", "assistant")


@dataclass(frozen=True)
class DataSet:
    """Examples from a slice of a file.

    Attributes:
        path: The file, the directory, or the name of a hub set.
        sha256: 64 hex digits over the bytes of the whole file. Of a directory: over its files' names and
            digests; of a hub set: over the slice's records (see `data.files`).
        num_records: Records in the whole file.
        examples: The slice, in the file's order.
        kind: What the records are, in words.
        notes: What the user should know of them, a line each.
        choice: What was chosen of the records beyond their file: which kind, if it is not one of the two
            that were always recognized; which response; fields of other names. Part of a run's identity.
    """

    path: Path | str
    sha256: str
    num_records: int
    examples: tuple[Example, ...]
    kind: str
    notes: tuple[str, ...] = ()
    choice: Mapping[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """What a run prints of its data."""
        count = f"{self.num_records} record{'s' * (self.num_records != 1)}"
        return [f"data: {self.path}, {count}, kind: {self.kind}", *self.notes]


def read_examples(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    limit: int | None = None,
    fields: Fields = Fields(),
    data_format: str = AUTO,
    response: str | None = None,
) -> DataSet:
    """Reads records `start` to `start + limit` of a file.

    Args:
        path: A file of one of `data.formats.FORMATS`, as it is or compressed; a directory that `datasets`
            saved or that holds the numbered parts of one set; or hf:ORG/NAME:SPLIT. Text is UTF-8, a byte
            order mark is accepted.
        start: First record, from 0.
        limit: How many records at most; None for all that follow.
        fields: Names of the record's fields.
        data_format: One of `FORMAT_NAMES`.
        response: "chosen" or "rejected": which of two responses; None if the records have one.

    Returns:
        The slice; never empty.

    Raises:
        UserError: The file is missing, unreadable, empty or broken; the slice is out of range; a
            record of the slice is of no kind, or not of the others' kind.
    """
    if start < 0:
        raise UserError(f"--start={start} is negative; records count from 0")
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} leaves no record; give 1 or more, or leave it out")
    if data_format not in FORMAT_NAMES:
        raise UserError(f"--data_format={data_format} is unknown; use {', '.join(FORMAT_NAMES)}")
    if response not in (None, *RESPONSE_NAMES):
        raise UserError(f"--response={response} is unknown; use {' or '.join(RESPONSE_NAMES)}")
    opened = open_records(path, needed_fields(fields), start, limit)
    if not opened.num_records:
        raise UserError(f"{opened.path}: the file holds no records; give one with at least one")
    if start >= opened.num_records:
        raise UserError(
            f"{opened.path}: --start={start} is beyond the end; the file has {opened.num_records} "
            f"records, the last one is {opened.num_records - 1}"
        )
    reader = _Reader(opened.path, start, fields, data_format, response)
    examples = reader.read(opened.records)
    if fields.input != Fields.input and fields.input not in opened.names:
        raise UserError(
            f"{opened.path}: no record has the field {fields.input!r} that --input_field names; "
            "correct it or leave the flag out"
        )
    return DataSet(
        opened.path,
        opened.sha256,
        opened.num_records,
        examples,
        reader.title,
        tuple(reader.notes()),
        reader.choice,
    )


class _Reader:
    """Reads the records of a slice: chooses their kind, and counts what it has to say."""

    def __init__(
        self, path: Path | str, start: int, fields: Fields, data_format: str, response: Any
    ) -> None:
        self._path, self._start, self._fields = path, start, fields
        self._forced = next((kind for kind in KINDS if kind.name == data_format), None)
        self._response = response
        self._kinds: Counter[RecordKind] = Counter()
        self._notes: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._columns: set[str] = set()
        self.choice: dict[str, str] = {}

    def read(self, records: Sequence[Any]) -> tuple[Example, ...]:
        """The examples of all records."""
        for i, record in enumerate(records):
            if not isinstance(record, dict):
                raise UserError(
                    f"{self._where(i)} is {kind_of(record)}, not an object; "
                    "write it as {instruction, input, output}"
                )
        recognized = [_recognized(record, self._fields, self._response) for record in records]
        kinds = [self._forced] * len(records) if self._forced else self._agreed(recognized)
        if self._response is not None and PREFERENCE not in kinds:
            raise UserError(
                f"{self._path}: --response={self._response} chooses between chosen and rejected, and "
                f"these records are {kinds[0].title} {kinds[0].form}; leave the flag out"
            )
        if not (set(kinds) <= _OLDEST and kinds == recognized):
            self.choice["kind"] = kinds[0].name
        if self._response is not None:
            self.choice["response"] = self._response
        if self._fields != Fields():
            self.choice["fields"] = ", ".join(dataclasses.astuple(self._fields))
        self._kinds.update(kinds)
        pairs = zip(records, kinds, strict=True)
        return tuple(self._example(i, record, kind) for i, (record, kind) in enumerate(pairs))

    def _where(self, i: int) -> str:
        return f"{self._path}: record {self._start + i}"

    def _agreed(self, recognized: Sequence[RecordKind | None]) -> list[RecordKind]:
        """A kind for each record; where a record has none, the file's."""
        found = [kind for kind in recognized if kind is not None]
        first = found[0] if found else ALPACA
        if not set(found) <= _OLDEST:
            for i, kind in enumerate(recognized):
                if kind not in (None, first):
                    assert kind is not None
                    raise UserError(
                        f"{self._where(i)} is of another kind than those before it: {kind.title} "
                        f"{kind.form} after {first.title} {first.form}; give each kind its own file, or "
                        "--data_format where all records have the fields of one"
                    )
        return [first if kind is None else kind for kind in recognized]

    def _example(self, i: int, values: Mapping[str, Any], kind: RecordKind) -> Example:
        record = Record(values, self._where(i), self._fields, self._response)
        try:
            parts = kind.read(record)
            has_turns = bool(parts.messages)
            messages = with_system(record, parts.messages) if has_turns else []
            more = template_values(record) if has_turns else {}
            example_id = _content_id(parts, messages, more)
        except MissingFieldError as error:
            raise UserError(_missing(record, error, kind)) from None
        except RecursionError:
            raise UserError(f"{record.where} is nested too deeply; leave it out") from None
        self._notes[parts.note] += bool(parts.note)
        for name in record.unread():
            if values[name] is NOT_READ:
                self._columns.add(name)
            else:
                self._unread[name] += 1
        return Example(
            self._start + i,
            example_id,
            tuple(messages),
            parts.response,
            parts.reply,
            more,
            parts.given,
            parts.joint,
        )

    @property
    def title(self) -> str:
        """The kind of the records, in words."""
        titles = [kind.title for kind in KINDS if kind in self._kinds]
        title = " and ".join(titles)
        return f"{title} ({self._response})" if self._response else title

    def notes(self) -> list[str]:
        """A line for each thing that the user should know."""
        lines = [f"note: {note} ({_times(count)})" for note, count in self._notes.items() if count]
        unread = [f"{name!r} in {_times(count)}" for name, count in self._unread.most_common()]
        unread += [f"the column {name!r}" for name in sorted(self._columns)]
        if unread:
            names = _listed(unread)
            lines.append(f"note: fields that are no part of an example's text: {names}")
        return lines


def _times(count: int) -> str:
    return f"{count} record{'s' * (count != 1)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _recognized(
    record: Mapping[str, Any], fields: Fields, response: str | None
) -> RecordKind | None:
    """The first kind that claims a record; if a response is chosen, first of all the kind that has two."""
    present = {name: None if value is NOT_READ else value for name, value in record.items()}
    if response is not None and PREFERENCE.claims(present, fields):
        return PREFERENCE
    return next((kind for kind in KINDS if kind.claims(present, fields)), None)


def _missing(record: Record, error: MissingFieldError, kind: RecordKind) -> str:
    """What a record lacks, and the most likely mend."""
    values = record.values
    has = _listed([repr(name) for name in values]) or "none"
    told = f"{record.where} has no field {error.name!r} (its fields: {has}); "
    other = _recognized(values, record.fields, record.response)
    if other not in (None, kind):
        assert other is not None
        return (
            f"{told}they are those of {other.title} {other.form}: give --data_format={other.name}"
        )
    for name, value in values.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and _recognized(first, record.fields, record.response):
            what = "that object" if first is value else "that list"
            return f"{told}its field {name!r} holds such records: write {what} alone"
    flags = _likely_flags(values, error, kind) if record.fields == Fields() else ""
    if flags:
        return f"{told}if they are what their names say, give {flags}"
    if error.flag:
        told += f"name the one that holds it with {error.flag}"
    else:
        told += f"{kind.title} are written {kind.form}"
    known = set().union(*(kind.form.strip("{}").split(", ") for kind in KINDS))
    return told if known & set(values) else f"{told}; known kinds: {_forms()}"


def _likely_flags(values: Mapping[str, Any], error: MissingFieldError, kind: RecordKind) -> str:
    """Flags that name the fields of a question and an answer; "" if none is there."""

    def named(flag: str, names: Sequence[str]) -> str:
        found = next((name for name in names if isinstance(values.get(name), str)), None)
        return f"{flag}={found}" if found else ""

    question = named("--instruction_field", QUESTIONS)
    if kind is PREFERENCE:
        return question if error.flag else ""
    answer = named("--output_field", _ANSWERS)
    if error.name == Fields.output:
        return answer
    return (
        f"{question} {answer}" if error.name == Fields.instruction and question and answer else ""
    )


def _forms() -> str:
    return ", ".join(kind.form for kind in KINDS)


def _content_id(parts: Parts, messages: Sequence[Any], more: Mapping[str, Any]) -> str:
    """16 hex digits over what an example holds. What came after the first runs counts only where it is."""
    content: dict[str, Any] = {
        "messages": [[m.role, m.content, *([m.more] if m.more else [])] for m in messages],
        "response": parts.response,
    }
    if parts.reply is not None:
        content["reply"] = parts.reply.more
    if more:
        content["template_values"] = more
    if parts.given is not None:
        content["token_ids"] = parts.given.token_ids
        content["targets"] = parts.given.targets
    if parts.joint != "\n":
        content["joint"] = parts.joint
    canonical = json.dumps(
        content, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=repr
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]
