"""The turns of a conversation, as records hold them -> `Message`.

Two spellings: {role, content}, and ShareGPT's {from, value}, whose names of roles are mapped. What else a
turn holds stays with it (`Message.more`), for the chat template. A field that is null counts as absent.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrad.data.chat_template import REASONING_FIELDS
from jaxgrad.data.examples import ROLES, Message
from jaxgrad.data.formats import kind_of
from jaxgrad.errors import UserError

_SPELLINGS = (("role", "content"), ("from", "value"))
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
# A turn with one of these may have no content.
_INSTEAD_OF_TEXT = ("tool_calls", "function_call", *REASONING_FIELDS)
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(turns: Any, where: str) -> list[Message]:
    """The turns of a conversation.

    Args:
        turns: A list of turns, or its JSON text, as CSV has it.
        where: For messages: file, record and field.

    Raises:
        UserError: It is no list of turns; a turn has no text, or a role that is not known.
    """
    turns = from_json_text(turns, "[")
    if not isinstance(turns, list):
        raise UserError(f"{where} is {kind_of(turns)}, not a list; write [{{role, content}}, ...]")
    return [read_turn(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def read_turn(turn: Any, where: str) -> Message:
    """One turn.

    Raises:
        UserError: As `read_turns`.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind_of(turn)}, not an object; write {{role, content}}")
    rest = {name: value for name, value in turn.items() if value is not None}
    is_sharegpt = "role" not in rest and "from" in rest
    speaker, text = _SPELLINGS[is_sharegpt]
    if speaker not in rest:
        raise _lacks(speaker, turn, where)
    given = string(rest.pop(speaker), f"{where}: {speaker!r}")
    role = _SHAREGPT_ROLES.get(given, given) if is_sharegpt else given
    if role not in ROLES:
        known = (*_SHAREGPT_ROLES, *ROLES) if is_sharegpt else ROLES
        raise UserError(f"{where} has role {given!r}; use one of {', '.join(known)}")
    if text in rest:
        content = _text(rest.pop(text), f"{where}: {text!r}")
    elif any(rest.get(name) for name in _INSTEAD_OF_TEXT):
        # A template may tell null from "": null is handed on as an absent key, as in transformers.
        content, rest["content"] = "", None
    elif text in turn:
        raise UserError(f"{where}: {text!r} is null, not a string; write it as text in quotes")
    else:
        raise _lacks(text, turn, where)
    if is_sharegpt and given == "function_call":
        rest |= {"tool_calls": _calls(content, where), "content": None}
        content = ""
    elif "tool_calls" in rest:
        rest["tool_calls"] = from_json_text(rest["tool_calls"], "[")
    return Message(role, content, rest)


def string(value: Any, what: str) -> str:
    """A text that can be encoded.

    Raises:
        UserError: It is something else, or holds half a surrogate pair.
    """
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


def from_json_text(value: Any, opening: str) -> Any:
    """The value that a text of JSON holds; anything else as it is.

    Args:
        value: Of a field that holds a list or an object, where some files have its JSON text.
        opening: The first characters that such a text may have.
    """
    if not isinstance(value, str) or not value.strip().startswith(tuple(opening)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def split_conversation(turns: Sequence[Message], where: str) -> tuple[tuple[Message, ...], Message]:
    """The prompt's turns, and the last turn, which is the assistant's.

    Raises:
        UserError: The last turn is another's, or there is no user turn before it.
    """
    if not turns or turns[-1].role != "assistant":
        last = f"ends with role {turns[-1].role!r}" if turns else "is empty"
        raise UserError(f"{where} {last}; the last turn must be the assistant's: the response")
    if not any(turn.role == "user" for turn in turns[:-1]):
        raise UserError(f"{where} has no user turn before the response; add the prompt")
    return tuple(turns[:-1]), turns[-1]


def _lacks(name: str, turn: Mapping[str, Any], where: str) -> UserError:
    has = ", ".join(repr(key) for key in turn) or "none"
    return UserError(
        f"{where} has no {name!r} (its fields: {has}); write {{role, content}} or {{from, value}}"
    )


def _text(content: Any, what: str) -> str:
    """A turn's content: text, or a list of parts that are texts."""
    if not isinstance(content, list):
        return string(content, what)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or part.get("text") is None:
            found = f"of type {kind!r}" if isinstance(kind, str) else kind_of(part)
            raise UserError(
                f"{what}[{i}] is {found}; only parts {{type: 'text', text: ...}} are read, "
                "so leave out the record or the part"
            )
        texts.append(string(part["text"], f"{what}[{i}]: 'text'"))
    return "".join(texts)


def _calls(text: str, where: str) -> list[Any]:
    """ShareGPT's function_call, JSON text of one call or of several, as tool_calls."""
    calls = from_json_text(text, "{[")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(
            f"{where} is a function_call whose value is no call; write it as "
            '{"name": ..., "arguments": {...}} in JSON'
        )
    return [{"type": "function", "function": call} for call in calls]
