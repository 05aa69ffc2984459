"""Chat templates: an example's turns -> text, by the tokenizer's template.

Every field of a turn and every further value of the record is handed to the template as it is. A field that
is null is left out, as transformers does. The arguments of a tool call stay an object or JSON text, as the
record has them (see `data.template_fields`, which names what is not printed as it stands).

A template is an untrusted program. Jinja's sandbox blocks files, imports and attributes, but not endless
loops or huge strings. So it runs with limits on time and memory (`bounded`) and on its output.
"""

import contextlib
import datetime
import functools
import inspect
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jinja2

from jaxgrad.data.examples import Example, Message
from jaxgrad.data.template_dates import with_date
from jaxgrad.errors import UserError

SYSTEM_MESSAGE = "You are a helpful assistant."
# A record with a turn of these roles has its own instructions.
SYSTEM_ROLES = ("system", "developer")

# Names of a turn's reasoning; of several the first counts, as in transformers.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Limits of a template for one example.
TEMPLATE_SECONDS = 20.0
TEMPLATE_BYTES = 2**28
TEMPLATE_CHARACTERS = 1_000_000  # plus 100 times those of the messages

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Turn = dict[str, Any]
Span = tuple[int, int]  # characters, from the first to behind the last


def uses_chat(tokenizer: Any, choice: Literal["auto", "yes", "no"]) -> bool:
    """Decides whether prompts go through the chat template.

    Args:
        tokenizer: A `transformers` tokenizer.
        choice: The flag --chat. "auto" means yes if the tokenizer has a template.

    Raises:
        UserError: "yes" without a template, or an unknown choice.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if choice == "auto":
        return has_template
    if choice not in ("yes", "no"):
        raise UserError(f"--chat={choice} is unknown; use auto, yes or no")
    if choice == "yes" and not has_template:
        raise UserError("--chat=yes, but the tokenizer has no chat template; use --chat=no")
    return choice == "yes"


class ChatTemplate:
    """A tokenizer's chat template on a day.

    Its methods raise whatever the template does: it is a program.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None = None) -> None:
        """Of a `transformers` tokenizer; the date is for templates that print it, None for today.

        Raises:
            UserError: There is no template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template; use --chat=no")
        self.tokenizer = tokenizer
        self.date = date

    def source(self, values: Mapping[str, Any]) -> str:
        """The template's text. Some tokenizers have one of its own for conversations with tools."""
        return self.tokenizer.get_chat_template(None, values.get("tools"))

    def has_marks(self, values: Mapping[str, Any]) -> bool:
        """Whether it marks what the assistant writes: `{% generation %}`."""
        return _MARK.search(self.source(values)) is not None

    def render(
        self, turns: Sequence[Turn], values: Mapping[str, Any], *, generation_prompt: bool
    ) -> str:
        """The turns as text, with or without the beginning of another turn of the assistant's."""
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = self.tokenizer.apply_chat_template(
                list(turns),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=self._dated(values),
                **values,
            )
        _check_text(text, turns, values)
        return text

    def render_with_marks(
        self, turns: Sequence[Turn], values: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """The turns as text, and the stretches that the template's marks cover."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {"tools": None, "documents": None, **self.tokenizer.special_tokens_map, **values}
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            # Its annotation says str, but it gives two lists.
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                chat_template=self._dated(values),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **given,
            )
        (text,), (spans,) = rendered
        _check_text(text, turns, values)
        return text, [(begin, end) for begin, end in spans]

    def _dated(self, values: Mapping[str, Any]) -> str:
        source = self.source(values)
        _refuse_powers(source)
        return source if self.date is None else with_date(source, self.date)


@dataclass(frozen=True)
class Conversation:
    """An example in the hands of a template.

    Attributes:
        example: What is rendered.
        template: What renders it.
        turns: The prompt's turns, the authors' system message included.
        reply: The last turn, whose text is measured.
        values: What else the record gives to the template.
        prompt: The turns rendered, with the beginning of the reply.
        whole: The turns and the reply rendered.
        failure: Why there is no `whole`; None where there is one.
    """

    example: Example
    template: ChatTemplate
    turns: tuple[Turn, ...]
    reply: Turn
    values: Mapping[str, Any]
    prompt: str
    whole: str
    failure: UserError | None = None

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """Other turns with the same values. Raises whatever the template does."""
        return self.template.render(turns, self.values, generation_prompt=generation_prompt)


def converse(example: Example, template: ChatTemplate) -> Conversation:
    """Renders an example's prompt and its whole conversation.

    The authors' system message comes first, unless the record has its own or the template refuses a system
    role (Gemma's does). Where the template renders the prompt but not the conversation, the result says so.

    Raises:
        UserError: The template fails on the prompt, or the record sets what is not its to set.
    """
    values = {name: value for name, value in example.template_values.items() if value is not None}
    for name in values:
        if name in _not_a_record_s():
            raise UserError(
                f"record {example.index} gives the chat template a value {name!r}, which is not the "
                "record's to give; remove it"
            )
    turns = tuple(as_turn(message) for message in example.messages)
    turns, prompt = _prompt(example, template, turns, values)
    reply = as_turn(example.reply or Message("assistant", example.response))
    whole, failure = "", None
    try:
        whole = template.render([*turns, reply], values, generation_prompt=False)
    except Exception as error:  # a template is a program, which may raise anything
        failure = _template_error(example, error, template.tokenizer, [*turns, reply])
    return Conversation(example, template, turns, reply, values, prompt, whole, failure)


def as_turn(message: Message) -> Turn:
    """A message as templates get it. Its reasoning is there by each name that they read it by."""
    turn = {"role": message.role, "content": message.content, **message.more}
    turn = {name: value for name, value in turn.items() if value is not None}
    reasoning = next((turn[name] for name in REASONING_FIELDS if name in turn), None)
    if reasoning is not None:
        turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
    return turn


def _prompt(
    example: Example, template: ChatTemplate, turns: tuple[Turn, ...], values: Mapping[str, Any]
) -> tuple[tuple[Turn, ...], str]:
    """The prompt's turns and their text."""
    if not any(turn["role"] in SYSTEM_ROLES for turn in turns):
        with_system = ({"role": "system", "content": SYSTEM_MESSAGE}, *turns)
        try:
            return with_system, template.render(with_system, values, generation_prompt=True)
        except jinja2.TemplateError:
            pass  # Gemma's raises on a system role. Any other error is raised again without it.
        except Exception as error:  # a template is a program, which may raise anything
            raise _template_error(example, error, template.tokenizer, turns) from error
    # The record's own system message is content: if the template refuses it, so do we.
    try:
        return turns, template.render(turns, values, generation_prompt=True)
    except Exception as error:
        raise _template_error(example, error, template.tokenizer, turns) from error


@functools.cache
def _not_a_record_s() -> frozenset[str]:
    """Names that a record must not hand to the template: they are the renderer's own."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names - {"tools", "documents"} | {"messages", "strftime_now"})


def _check_text(text: str, turns: Sequence[Turn], values: Mapping[str, Any]) -> None:
    text.encode("utf-8")  # raises on half a surrogate pair, which no tokenizer can read
    if len(text) > TEMPLATE_CHARACTERS:
        given = len(repr(turns)) + len(repr(values))
        if len(text) > TEMPLATE_CHARACTERS + 100 * given:
            raise ValueError(f"it makes {len(text)} characters of messages that are far shorter")


@functools.lru_cache(maxsize=8)
def _refuse_powers(template: str) -> None:
    """Raise on `**`: 9**9**9 is one operation of hours, which no time limit can interrupt."""
    if any(
        kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(template)
    ):
        raise ValueError("it takes powers (**), which no text needs")


def _template_error(
    example: Example, error: Exception, tokenizer: Any, turns: Sequence[Turn]
) -> UserError:
    roles = ", ".join(turn["role"] for turn in turns)
    detail = " ".join((str(error) or type(error).__name__).split())[:300]
    name = getattr(tokenizer, "name_or_path", "")
    hint = ""
    if any(turn.get("tool_calls") for turn in turns):
        hint = (
            " (of its tool calls: some templates want `arguments` as an object, some as JSON text)"
        )
    return UserError(
        f"record {example.index}: the chat template{f' of {name}' if name else ''} fails on the roles "
        f"{roles}: {detail}; mend the record's messages{hint}, or use --chat=no"
    )


class OutOfTimeError(Exception):
    """A `bounded` block ran too long."""


@contextlib.contextmanager
def bounded(seconds: float, more_bytes: int) -> Iterator[None]:
    """Limits the time of the block, and the memory that it may add.

    The limits hold only on the main thread of a Linux process, where every command does this work. On
    another thread there are none: no signal arrives there, and a memory limit would hit all threads. The
    block must be pure Python: a library that cannot allocate may end the process.

    Args:
        seconds: Wall-clock time.
        more_bytes: Address space that the block may add to the process.

    Raises:
        OutOfTimeError: It took longer.
        MemoryError: It needed more.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    import resource

    def raise_out_of_time(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"it takes more than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    limit = min(x for x in (limit, soft, hard) if x != resource.RLIM_INFINITY)
    previous_handler = signal.signal(signal.SIGALRM, raise_out_of_time)
    try:
        try:
            # Repeated every second, because a destructor may swallow the first exception.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # a second one, because the signal may arrive during the line above
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous_handler)
