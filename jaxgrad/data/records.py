"""Kinds of records: a record's fields -> the parts of an example (docs/data.md shows one of each).

A new kind is a function and an entry in `KINDS`. `data.read` chooses the kind of a file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxgrad.data.examples import Fields, Message
from jaxgrad.data.formats import kind_of
from jaxgrad.data.given import IDS, LABELS, MASKS, TOKEN_FIELDS, read_given
from jaxgrad.data.messages import (
    from_json_text,
    read_turn,
    read_turns,
    split_conversation,
    string,
)
from jaxgrad.data.record import RESPONSE_NAMES, MissingFieldError, Parts, Record, RecordKind
from jaxgrad.errors import UserError

_CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_DOCUMENTS, _TEMPLATE_ARGUMENTS = "documents", "chat_template_kwargs"
# What a template's call sets itself.
_NOT_ARGUMENTS = {
    *("messages", "conversation", "chat_template", "add_generation_prompt", "tokenize", "padding"),
    *("continue_final_message", "return_dict", "return_assistant_tokens_mask", "return_tensors"),
    *("truncation", "max_length", "tokenizer_kwargs", *_TOOLS, _DOCUMENTS),
}
# What files call a prompt.
QUESTIONS = ("question", "query", "problem", "prompt", "user")
_TEXTS_NOTE = (
    "prompt and response are plain texts: with a chat template the prompt is a user's turn; --chat=no "
    "puts the two together as they are, as TRL does"
)
_TURNS_NOTE = "the response has several turns: its last one is measured"


def needed_fields(fields: Fields) -> set[str]:
    """Names of all fields that a kind of record reads."""
    names = {fields.instruction, fields.input, fields.output, "history", "messages", "text"}
    names |= {"prompt", "completion", *RESPONSE_NAMES, *TOKEN_FIELDS, *_CONVERSATIONS}
    return names | {*_SYSTEM, *_TOOLS, _DOCUMENTS, _TEMPLATE_ARGUMENTS}


def _has(record: Mapping[str, Any], *names: str) -> bool:
    return all(record.get(name) is not None for name in names)


# Alpaca


def _read_alpaca(record: Record) -> Parts:
    instruction = record.needed_text(record.fields.instruction, "--instruction_field")
    response = record.needed_text(record.fields.output, "--output_field")
    return Parts([*_history(record), _question(record, instruction)], response)


def _question(record: Record, instruction: str) -> Message:
    more = record.text(record.fields.input)
    return Message("user", f"{instruction}\n{more}" if more else instruction)


def _history(record: Record) -> list[Message]:
    """Earlier turns: [[question, answer], ...]."""
    pairs, where = from_json_text(record.get("history"), "["), record.of("history")
    turns: list[Message] = []
    if pairs is None:
        return turns
    if not isinstance(pairs, list):
        raise UserError(f"{where} is {kind_of(pairs)}, not a list; write [[question, answer], ...]")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}[{i}] is not a pair; write [[question, answer], ...]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, string(text, f"{where}[{i}]")))
    return turns


# Conversations


def _conversation_reader(*names: str) -> Callable[[Record], Parts]:
    """Of records whose turns are in the first of these fields that is there."""

    def read(record: Record) -> Parts:
        name = next((name for name in names if record.values.get(name) is not None), names[0])
        where = record.of(name)
        turns = read_turns(record.needed(name), where)
        prompt, reply = split_conversation(turns, where)
        return _answered(prompt, reply)

    return read


def _answered(prompt: Sequence[Message], reply: Message, note: str = "") -> Parts:
    return Parts(prompt, reply.content, reply if reply.more else None, note=note)


# Prompts with completions, chosen and rejected


def _read_completion(record: Record) -> Parts:
    prompt = _side(record, "prompt")
    return _put_together(prompt, _side(record, "completion"), record.of("completion"))


def _read_preference(record: Record) -> Parts:
    if record.response is None:
        raise UserError(
            f"{record.where} has a chosen and a rejected response; give --response=chosen or "
            "--response=rejected (each makes a run of its own, to be compared)"
        )
    chosen, rejected = (_side(record, name) for name in RESPONSE_NAMES)
    where = record.of(record.response)
    if isinstance(chosen, str) and isinstance(rejected, str):
        response = chosen if record.response == "chosen" else rejected
        prompt = _preference_prompt(record, holds_user=False)
        if prompt is not None:
            return _put_together(prompt, response, where)
        _refuse_other_prompt(record)
        # As TRL does: what the two texts have in common in front is the prompt, but for a last space.
        common = _common(chosen, rejected)
        common -= chosen[:common].endswith(" ")
        if not common:
            raise MissingFieldError("prompt", "--instruction_field")
        prompt_turn = Message("user", chosen[:common])
        return Parts([prompt_turn], response[common:], joint="", note=_TEXTS_NOTE)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: one response is text, the other has turns; write both alike")
    turns = chosen if record.response == "chosen" else rejected
    holds_user = any(turn.role == "user" for turn in turns)
    prompt = _preference_prompt(record, holds_user=holds_user)
    if isinstance(prompt, list):
        # Some files repeat the prompt in front of both responses.
        repeated = len(prompt) if turns[: len(prompt)] == prompt else 0
        return _put_together(prompt, turns[repeated:], where)
    if not holds_user:
        if prompt is None:
            raise MissingFieldError("prompt", "--instruction_field")
        return _put_together(prompt, turns, where)
    _refuse_other_prompt(record)
    if prompt is not None and prompt not in [turn.content for turn in turns]:
        raise UserError(
            f"{where} has a user's turn that is not the text of 'prompt'; write the prompt as turns"
        )
    common = min(_common(chosen, rejected), len(turns) - 1)
    return _put_together(turns[:common], turns[common:], where)


def _refuse_other_prompt(record: Record) -> None:
    """Raise if a field looks like a prompt under another name: it must not get lost."""
    if any(isinstance(record.values.get(name), str) for name in QUESTIONS if name != "prompt"):
        raise MissingFieldError("prompt", "--instruction_field")


def _preference_prompt(record: Record, *, holds_user: bool) -> str | list[Message] | None:
    """The prompt in any of its forms; None if it stands in front of both responses.

    Args:
        record: With chosen and rejected.
        holds_user: Whether these have a user's turn. Then `messages`, if there, is the chosen one again.
    """
    if _has(record.values, "prompt"):
        return _side(record, "prompt")
    for name in _CONVERSATIONS if holds_user else (*_CONVERSATIONS, "messages"):
        if _has(record.values, name):
            return read_turns(record.get(name), record.of(name))
    if _has(record.values, record.fields.instruction):
        instruction = record.text(record.fields.instruction)
        return [*_history(record), _question(record, instruction)]
    return None


def _side(record: Record, name: str) -> str | list[Message]:
    """A prompt or a response: text, turns, or one turn."""
    value, where = from_json_text(record.needed(name), "[{"), record.of(name)
    if isinstance(value, dict):
        return [read_turn(value, where)]
    if isinstance(value, list):
        return read_turns(value, where)
    return string(value, where)


def _put_together(prompt: str | list[Message], response: str | list[Message], where: str) -> Parts:
    """Two texts stand behind each other as they are; in turns a text is the user's or the assistant's."""
    if isinstance(prompt, str) and isinstance(response, str):
        return Parts([Message("user", prompt)], response, joint="", note=_TEXTS_NOTE)
    before = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    after = [Message("assistant", response)] if isinstance(response, str) else response
    turns, reply = split_conversation([*before, *after], where)
    return _answered(turns, reply, _TURNS_NOTE if len(after) > 1 else "")


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common in front."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


# Text and tokens


def _read_text(record: Record) -> Parts:
    return Parts(response=string(record.needed("text"), record.of("text")))


def _read_tokens(record: Record) -> Parts:
    values = {name: record.get(name) for name in TOKEN_FIELDS}
    masked = any(values[name] is not None for name in (LABELS, *MASKS))
    note = "" if masked else "tokens without labels and without a mask: every token counts"
    return Parts(given=read_given({**values, IDS: record.needed(IDS)}, record.where), note=note)


# In this order: where a record has the fields of two kinds, the first one reads it.
ALPACA = RecordKind(
    "alpaca",
    "Alpaca",
    "{instruction, input, output}",
    lambda record, fields: _has(record, fields.instruction, fields.output),
    _read_alpaca,
)
MESSAGES = RecordKind(
    "messages",
    "messages",
    "{messages: [{role, content}, ...]}",
    lambda record, fields: _has(record, "messages"),
    _conversation_reader("messages"),
)
_SHAREGPT = RecordKind(
    "sharegpt",
    "ShareGPT conversations",
    "{conversations: [{from, value}, ...]}",
    lambda record, fields: (
        any(_has(record, name) for name in _CONVERSATIONS) and not _has(record, *RESPONSE_NAMES)
    ),
    _conversation_reader(*_CONVERSATIONS),
)
PREFERENCE = RecordKind(
    "preference",
    "preferences",
    "{prompt, chosen, rejected}",
    lambda record, fields: _has(record, *RESPONSE_NAMES),
    _read_preference,
)
_COMPLETION = RecordKind(
    "completion",
    "prompts and completions",
    "{prompt, completion}",
    lambda record, fields: _has(record, "prompt", "completion"),
    _read_completion,
)
_TOKENS = RecordKind(
    "tokens",
    "tokens",
    "{input_ids, labels}",
    lambda record, fields: _has(record, IDS),
    _read_tokens,
)
_TEXT = RecordKind(
    "text",
    "texts, whose every token counts",
    "{text}",
    lambda record, fields: _has(record, "text"),
    _read_text,
)
KINDS = (ALPACA, MESSAGES, _SHAREGPT, PREFERENCE, _COMPLETION, _TOKENS, _TEXT)


# What all kinds share


def with_system(record: Record, messages: Sequence[Message]) -> list[Message]:
    """The turns behind the record's system message, if it has one in a field of its own.

    Raises:
        UserError: The turns begin with another one.
    """
    system = "\n".join(filter(None, (record.text(name) for name in _SYSTEM)))
    if not system:
        return list(messages)
    if not messages or messages[0].role not in ("system", "developer"):
        return [Message("system", system), *messages]
    if messages[0].content != system:
        raise UserError(
            f"{record.where} has two system messages, a field and a turn, that differ; leave one out"
        )
    return list(messages)


def template_values(record: Record) -> dict[str, Any]:
    """What of a record a chat template reads besides the turns.

    Raises:
        UserError: A field is not of the form that templates read.
    """
    values: dict[str, Any] = {}
    for name in (*_TOOLS, _DOCUMENTS):
        items = from_json_text(record.get(name), "[{")
        if items is None or items == "":
            continue
        if not isinstance(items, list):
            raise UserError(
                f"{record.of(name)} is {kind_of(items)}, not a list; write [{{...}}, ...], or its JSON text"
            )
        values[name] = [from_json_text(item, "{") for item in items]
    arguments = from_json_text(record.get(_TEMPLATE_ARGUMENTS), "{")
    if arguments is None or arguments == "":
        return values
    if not isinstance(arguments, dict):
        raise UserError(
            f"{record.of(_TEMPLATE_ARGUMENTS)} is {kind_of(arguments)}, not an object; "
            "write {name: value}"
        )
    reserved = sorted(_NOT_ARGUMENTS & arguments.keys())
    if reserved:
        raise UserError(
            f"{record.of(_TEMPLATE_ARGUMENTS)} sets {reserved[0]!r}, which is not the record's to set; "
            "remove it there"
        )
    return values | arguments
