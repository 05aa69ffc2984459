"""A record on its way to an example: which of its fields are read, and what they say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxgrad.data.examples import Fields, GivenTokens, Message
from jaxgrad.data.messages import string
from jaxgrad.data.tables import NOT_READ

ResponseName = Literal["chosen", "rejected"]
RESPONSE_NAMES: tuple[ResponseName, ...] = get_args(ResponseName)


class MissingFieldError(Exception):
    """A record lacks a field. `flag`, if any, names another field in its place."""

    def __init__(self, name: str, flag: str = "") -> None:
        super().__init__(name)
        self.name, self.flag = name, flag


class Record:
    """A record that notes which of its fields are asked for. Null counts as absent."""

    def __init__(
        self, values: Mapping[str, Any], where: str, fields: Fields, response: ResponseName | None
    ) -> None:
        self.values, self.where = values, where
        self.fields, self.response = fields, response
        self._asked: set[str] = set()

    def get(self, name: str) -> Any:
        """A field's value; None if it is absent."""
        self._asked.add(name)
        value = self.values.get(name)
        return None if value is NOT_READ else value

    def needed(self, name: str, flag: str = "") -> Any:
        """The value of a field that must be there.

        Raises:
            MissingFieldError: The record does not have it.
        """
        if name not in self.values:
            raise MissingFieldError(name, flag)
        return self.get(name)

    def text(self, name: str) -> str:
        """A text that may be absent: "" then."""
        value = self.get(name)
        return "" if value is None else string(value, self.of(name))

    def needed_text(self, name: str, flag: str) -> str:
        """A text that must be there."""
        return string(self.needed(name, flag), self.of(name))

    def of(self, name: str) -> str:
        """A field, for messages."""
        return f"{self.where}: field {name!r}"

    def unread(self) -> list[str]:
        """Fields that are not null and were not asked for."""
        return [k for k, v in self.values.items() if v is not None and k not in self._asked]


@dataclass(frozen=True)
class Parts:
    """What a record says of an example, see `Example`; and what the user should know of such records."""

    messages: Sequence[Message] = ()
    response: str = ""
    reply: Message | None = None
    given: GivenTokens | None = None
    joint: str = "\n"
    note: str = ""


@dataclass(frozen=True)
class RecordKind:
    """A kind of record.

    Attributes:
        name: Of --data_format.
        title: In the run's first lines.
        form: For messages.
        claims: Whether a record (its values, and the names of Alpaca's fields) is of this kind.
        read: The record's parts. Raises a `UserError` if it is not as it should be.
    """

    name: str
    title: str
    form: str
    claims: Callable[[Mapping[str, Any], Fields], bool]
    read: Callable[[Record], Parts]
