"""Chat templates: an example's messages -> its prompt, by the tokenizer's template.

A template is an untrusted program. Jinja's sandbox blocks files, imports and attributes, but not endless
loops or huge strings. So it runs with limits on time and memory (`bounded`) and on its output.
"""

import contextlib
import datetime
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jinja2

from jaxgrad.data.examples import Example
from jaxgrad.errors import UserError

SYSTEM_MESSAGE = "You are a helpful assistant."

# Limits of a template for one example.
TEMPLATE_SECONDS = 20.0
TEMPLATE_BYTES = 2**28
TEMPLATE_CHARACTERS = 1_000_000  # plus 100 times those of the messages


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


def render_prompt(example: Example, tokenizer: Any, date: datetime.date | None) -> str:
    """The prompt of an example, up to the start of the response.

    The authors' system message comes first, unless the record has its own or the template refuses a system
    role (Gemma's does).

    Args:
        example: Its messages are rendered.
        tokenizer: A `transformers` tokenizer.
        date: The day, for templates that print it; None for today.

    Raises:
        UserError: There is no template, or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template; use --chat=no")
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    if any(turn["role"] == "system" for turn in turns):
        # The record's own system message is content: if the template refuses it, so do we.
        return _render(turns, example, tokenizer, date)
    system = {"role": "system", "content": SYSTEM_MESSAGE}
    try:
        return _apply_template([system, *turns], tokenizer, date)
    except jinja2.TemplateError:
        # Gemma's template raises on a system role. Any other error is raised again without it.
        return _render(turns, example, tokenizer, date)
    except Exception as error:  # a template is a program, which may raise anything
        raise _template_error(example, error, tokenizer) from error


def _render(
    turns: list[dict[str, str]], example: Example, tokenizer: Any, date: datetime.date | None
) -> str:
    try:
        return _apply_template(turns, tokenizer, date)
    except Exception as error:  # a template is a program, which may raise anything
        raise _template_error(example, error, tokenizer) from error


def _apply_template(turns: list[dict[str, str]], tokenizer: Any, date: datetime.date | None) -> str:
    own_template = tokenizer.get_chat_template()
    _refuse_powers(own_template)
    template = None
    if date is not None and "strftime_now" in own_template:
        template = _fixed_date(date) + own_template
    with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
        prompt = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, chat_template=template
        )
    prompt.encode("utf-8")  # raises on half a surrogate pair, which no tokenizer can read
    most = TEMPLATE_CHARACTERS + 100 * sum(len(turn["content"]) for turn in turns)
    if len(prompt) > most:
        raise ValueError(f"it makes {len(prompt)} characters of messages that are far shorter")
    return prompt


@functools.lru_cache(maxsize=8)
def _refuse_powers(template: str) -> None:
    """Raise on `**`: 9**9**9 is one operation of hours, which no time limit can interrupt."""
    if any(
        kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(template)
    ):
        raise ValueError("it takes powers (**), which no text needs")


def _fixed_date(date: datetime.date) -> str:
    """A macro that replaces transformers' `strftime_now` and formats this date instead of today's."""
    known = "".join(f"|replace('%{x}', '{date.strftime(f'%{x}')}')" for x in "aAbBdmyYj")
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{known} }}}}{{%- endmacro -%}}"


def _template_error(example: Example, error: Exception, tokenizer: Any) -> UserError:
    roles = ", ".join(message.role for message in example.messages)
    detail = " ".join((str(error) or type(error).__name__).split())[:300]
    name = getattr(tokenizer, "name_or_path", "")
    return UserError(
        f"record {example.index}: the chat template{f' of {name}' if name else ''} fails on the roles "
        f"{roles}: {detail}; mend the record's messages, or use --chat=no"
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
