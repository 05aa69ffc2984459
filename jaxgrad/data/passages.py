r"""An example -> the text that is measured, and the stretches of it whose tokens are targets.

| the record is | `paper` | `clean` |
|---|---|---|
| plain text | the text; all of it | the same |
| a prompt and a response, no template | the turns joined by newlines + "\n" + response; the response | the same |
| a conversation, through the template | the rendered prompt + response; the response | the rendered conversation; the reply behind its header, with what closes it, or what the template marks |

With turns="all" (`clean` only) every turn of the assistant's counts like the last one.

In `paper` the response is the reply's text, as the authors have it. If the template prints more of the reply
(a tool call, its reasoning), it is what stands behind the rendered prompt, without what closes a turn.
"""  # noqa: E501 (a table row cannot be wrapped)

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxgrad.data.chat_template import ChatTemplate, Conversation, Span, converse
from jaxgrad.data.examples import Example
from jaxgrad.data.template_fields import FieldWatch, plain_text_leaves_out
from jaxgrad.data.turns import (
    assistant_spans,
    renders_nothing,
    renders_text_alone,
    reply_without_closing,
)
from jaxgrad.errors import UserError

ProtocolName = Literal["paper", "clean"]
Turns = Literal["last", "all"]

RENDERED_OTHERWISE = (
    "the template renders the whole conversation otherwise than prompt + response; "
    "--protocol=clean measures the rendered one"
)


@dataclass(frozen=True)
class Passage:
    """What is measured of an example, before it is tokens.

    Attributes:
        text: All of it.
        spans: Stretches of characters, ascending, whose tokens are targets.
        is_empty: Nothing is rendered for the reply.
        notes: What the user should know of it. They have nothing of the example's own, so that equal ones
            are counted together.
    """

    text: str
    spans: tuple[Span, ...]
    is_empty: bool
    notes: tuple[str, ...] = ()


def plain_passage(example: Example, turns: Turns) -> Passage:
    """The passage of plain text, and of a conversation without a template."""
    notes = tuple(plain_text_leaves_out(example))
    if not example.messages:
        text = example.response
        return Passage(text, ((0, len(text)),), not text, notes)
    spans, text = [], ""
    for i, message in enumerate(example.messages):
        text += "\n" if i else ""
        if message.role == "assistant" and message.content and turns == "all":
            spans.append((len(text), len(text) + len(message.content)))
        text += message.content
    text += example.joint
    spans.append((len(text), len(text) + len(example.response)))
    is_empty = not example.response and len(spans) == 1
    return Passage(text + example.response, tuple(spans), is_empty, notes)


class Renderer:
    """Examples -> passages by one template, of one run."""

    def __init__(self, template: ChatTemplate, protocol: ProtocolName, turns: Turns) -> None:
        """For a protocol."""
        self._template = template
        self._watch = FieldWatch(template)
        self._turns = turns
        self._passage = _paper_passage if protocol == "paper" else self._clean_passage
        self._prompt_alone = protocol == "paper"

    def passage(self, example: Example) -> Passage:
        """The passage of a conversation.

        Raises:
            UserError: The template fails, or the reply's place cannot be told.
        """
        talk = converse(example, self._template)
        found = _told(talk, self._passage)
        left_out = self._watch.left_out(talk, found.text, prompt_alone=self._prompt_alone)
        return Passage(found.text, found.spans, found.is_empty, (*found.notes, *left_out))

    def _clean_passage(self, talk: Conversation) -> Passage:
        if talk.failure is not None:
            raise talk.failure
        spans = assistant_spans(talk, self._turns)
        is_empty = not talk.example.response and renders_nothing(talk)
        if is_empty and self._turns == "all":
            said = (turn for turn in talk.turns if turn["role"] == "assistant")
            is_empty = not any(turn.get("content") or len(turn) > 2 for turn in said)
        return Passage(talk.whole, tuple(spans), is_empty)


def _paper_passage(talk: Conversation) -> Passage:
    response = talk.example.response
    if talk.example.reply is not None:
        if talk.failure is not None:
            raise talk.failure
        if not renders_text_alone(talk):
            response = reply_without_closing(talk)
    text = talk.prompt + response
    differs = talk.failure is not None or not talk.whole.startswith(text)
    notes = (RENDERED_OTHERWISE,) if differs else ()
    return Passage(text, ((len(talk.prompt), len(text)),), not response, notes)


def _told(talk: Conversation, make: Callable[[Conversation], Passage]) -> Passage:
    """The passage; what a template raises while parts are rendered is an error of the record."""
    try:
        return make(talk)
    except UserError:
        raise
    except Exception as error:  # a template is a program, which may raise anything
        detail = " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(
            f"record {talk.example.index}: the chat template fails on a part of the conversation: "
            f"{detail}; use --chat=no"
        ) from error
