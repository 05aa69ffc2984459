"""Chat templates: a record's messages -> the prompt that a tokenizer's own template makes of them.

A template is a program from whoever made the model. Jinja's sandbox keeps it from files, imports and
attributes, but not from endless loops or huge strings. So it runs under a limit of time and memory
(`bounded`), and its text may be only so long.
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

# What a template may take for one example: time, memory, and characters besides a hundred times its
# messages'.
TEMPLATE_SECONDS = 20.0
TEMPLATE_BYTES = 2**28
TEMPLATE_CHARACTERS = 1_000_000


def uses_chat(tokenizer: Any, choice: Literal["auto", "yes", "no"]) -> bool:
    """Decides whether prompts go through the chat template.

    Args:
        tokenizer: A `transformers` tokenizer.
        choice: The flag --chat. `auto` is yes if the tokenizer has a template.

    Raises:
        UserError: `yes` without a template, or an unknown choice.
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
    """The prompt of an example, up to where the response begins.

    The authors' system message comes first. It is left out where the record has one of its own, or where
    the template refuses a system role (Gemma's does).

    Args:
        example: whose messages are rendered.
        tokenizer: a `transformers` tokenizer.
        date: the day that templates print which ask for one; None for today.

    Raises:
        UserError: there is no template, or it fails.
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
        # Gemma's template raises on a system role. Any other fault shows again without it.
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


def _apply_template(
    turns: list[dict[str, str]], tokenizer: Any, date: datetime.date | None
) -> str:
    template, whole = None, tokenizer.get_chat_template()
    _refuse_powers(whole)
    if date is not None and "strftime_now" in whole:
        template = _fixed_date(date) + whole
    with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
        prompt = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, chat_template=template
        )
    prompt.encode("utf-8")  # raises for half a surrogate pair, which no tokenizer can read
    most = TEMPLATE_CHARACTERS + 100 * sum(len(turn["content"]) for turn in turns)
    if len(prompt) > most:
        raise ValueError(f"it makes {len(prompt)} characters of messages that are far shorter")
    return prompt


@functools.lru_cache(maxsize=8)
def _refuse_powers(template: str) -> None:
    """9**9**9 takes hours inside one operation, which no limit on time can break off."""
    if any(
        kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(template)
    ):
        raise ValueError("it takes powers (**), which no text needs")


def _fixed_date(date: datetime.date) -> str:
    """A macro in place of the function that transformers gives to templates, which says today."""
    known = "".join(f"|replace('%{x}', '{date.strftime(f'%{x}')}')" for x in "aAbBdmyYj")
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{known} }}}}{{%- endmacro -%}}"


def _template_error(example: Example, error: Exception, tokenizer: Any) -> UserError:
    roles = ", ".join(message.role for message in example.messages)
    told = " ".join((str(error) or type(error).__name__).split())[:300]
    of = getattr(tokenizer, "name_or_path", "")
    return UserError(
        f"record {example.index}: the chat template{f' of {of}' if of else ''} fails on the roles "
        f"{roles}: {told}; mend the record's messages, or use --chat=no"
    )


class OutOfTimeError(Exception):
    """The time is over."""


@contextlib.contextmanager
def bounded(seconds: float, more_bytes: int) -> Iterator[None]:
    """Runs the block's Python code under a limit of time, and of memory besides what there is.

    Both hold on the main thread of a Linux process alone, where every binary does such work. On another
    thread no signal arrives, and other threads would meet the limit on memory: there is none then. It is
    for pure Python: a library that cannot allocate may end the process.

    Args:
        seconds: of wall clock.
        more_bytes: of address space that the block may add to the process.

    Raises:
        OutOfTimeError: the time is over.
        MemoryError: the memory is.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    import resource

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"it takes more than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    limit = min(x for x in (limit, soft, hard) if x != resource.RLIM_INFINITY)
    before = signal.signal(signal.SIGALRM, over)
    try:
        try:
            # Again every second: where Python swallows exceptions (a destructor) the first is lost.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own: the signal may arrive in the line above
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
