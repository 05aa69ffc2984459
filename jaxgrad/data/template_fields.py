"""Which fields of a record its rendering leaves out.

A field counts as printed where its text stands in the rendering, or where the rendering changes without it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from jaxgrad.data.chat_template import ChatTemplate, Conversation, as_turn
from jaxgrad.data.examples import Example, Message

_LONG_ENOUGH = 24  # characters of a field's texts that stand in a rendering by no accident
_TRIES = 3  # examples that show that a field which the template does not name is not printed


def plain_text_leaves_out(example: Example) -> list[str]:
    """The fields of a record that plain text has no place for, in words."""
    turns = [*example.messages, *([example.reply] if example.reply else [])]
    fields = {
        f"plain text leaves out {name!r} of {turn.role!r} turns"
        for turn in turns
        for name, value in turn.more.items()
        if _is_something(value)
    }
    fields |= {
        f"plain text leaves out the record's {name!r}"
        for name, value in example.template_values.items()
        if _is_something(value)
    }
    return sorted(fields)


def _is_something(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


class FieldWatch:
    """Finds what a template leaves out, over the examples of a run."""

    def __init__(self, template: ChatTemplate) -> None:
        """Of a run's template."""
        self._template = template
        self._names: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._tries: dict[tuple[str, str], int] = {}

    def left_out(self, talk: Conversation, text: str, *, prompt_alone: bool) -> list[str]:
        """The fields of an example that its text does not have, in words without the example's own.

        Args:
            talk: The example.
            text: What is measured of it.
            prompt_alone: The prompt's turns are rendered without the reply (protocol `paper`).
        """
        source = self._template.source(talk.values)
        if source not in self._names:
            self._names[source] = _names_in(source)
        named, variables = self._names[source]
        found = {
            f"the chat template does not read the record's {name!r}"
            for name, value in talk.values.items()
            if name not in variables and _is_something(value)
        }
        example = talk.example
        messages = [*example.messages, example.reply or Message("assistant", example.response)]
        added = len(talk.turns) - len(example.messages)  # the authors' system message
        for i, message in enumerate(messages, added):
            if message.content.strip() not in text:
                found.add(f"the chat template drops or changes the text of {message.role!r} turns")
            for name, value in message.more.items():
                if _is_something(value) and not self._is_printed(
                    talk, i, message, name, text, named, prompt_alone and i < len(talk.turns)
                ):
                    found.add(
                        f"the chat template does not print {name!r} of {message.role!r} turns"
                    )
            if _has_quoted_arguments(message, text):
                found.add(
                    "the chat template writes the arguments of tool calls, which are JSON text in the "
                    "record, once more as JSON, with quotes; give them as an object"
                )
        return sorted(found)

    def _is_printed(
        self,
        talk: Conversation,
        i: int,
        message: Message,
        name: str,
        text: str,
        named: frozenset[str],
        in_prompt: bool,
    ) -> bool:
        turns = list(talk.turns) if in_prompt else [*talk.turns, talk.reply]
        texts = list(_texts(message.more[name]))
        if sum(map(len, texts)) >= _LONG_ENOUGH and all(one in text for one in texts):
            return True
        key = (message.role, name)
        if name not in named and self._tries.get(key, 0) >= _TRIES:
            return False
        turns[i] = as_turn(dataclasses.replace(message, more={**message.more, name: None}))
        try:
            without = talk.render(turns, generation_prompt=in_prompt)
        except Exception:  # it cannot do without
            return True
        if without != (talk.prompt if in_prompt else talk.whole):
            return True
        self._tries[key] = self._tries.get(key, 0) + 1
        return False


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value of JSON's kinds."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield json.dumps(value)


def _has_quoted_arguments(message: Message, text: str) -> bool:
    calls = message.more.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
            return True
    return False


class _Generation(jinja2.ext.Extension):
    """The tag that transformers adds, so that a template with it can be parsed."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _names_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """All names that a template could read a field by, and the variables that it takes from outside."""
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    tree = environment.parse(source)
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    names |= {n.value for n in tree.find_all(jinja2.nodes.Const) if isinstance(n.value, str)}
    return frozenset(names), frozenset(jinja2.meta.find_undeclared_variables(tree))
