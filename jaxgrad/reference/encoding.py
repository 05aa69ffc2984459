"""An example's tokens as the PyTorch reference takes them, written independently of `jaxgrad.data`."""

import contextlib
import datetime
import re
from typing import Any, NamedTuple

import jinja2

from jaxgrad.data import tokens
from jaxgrad.data.examples import Example, Message
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions

_ANY_TEXT = "\ufdd0any text\ufdd1"  # noncharacters, which no template and no record has
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Encoding(NamedTuple):
    """One example as the reference reads it.

    Attributes:
        token_ids: after truncation.
        targets: positions of the tokens whose labels are not masked, ascending; never 0.
        truncated: whether tokens were cut off.
        reason: why the example is not measured; None if it is.
    """

    token_ids: list[int]
    targets: list[int]
    truncated: bool
    reason: str | None

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens have masked labels."""
        return len(self.token_ids) - len(self.targets)


def encode_example(example: Example, tokenizer: Any, options: AnalyzeOptions) -> Encoding:
    """Token ids and targets by the options' protocol.

    `paper` is written here a second time, from the paper's description. `clean` is our own protocol, so it
    is taken from `jaxgrad.data.tokens`; but where the template marks what the assistant writes, the targets
    are read here a second time.

    Raises:
        UserError: see `jaxgrad.data.tokens.tokenize`.
    """
    has_template = bool(tokenizer.chat_template)
    chat = has_template if options.chat == "auto" else options.chat == "yes"
    if options.max_length is None:
        raise ValueError("max_length is not settled; see AnalyzeOptions.fitted_to")
    if example.given is not None:
        return _given(example, options.max_length)
    if options.protocol == "clean":
        return _clean(example, tokenizer, options, chat)
    if not example.messages:
        prompt, response = "", example.response
    elif chat:
        prompt, response = _prompt_and_response(example, tokenizer, options.date)
    else:
        prompt = "\n".join(m.content for m in example.messages) + example.joint
        response = example.response
    return _paper(prompt, response, tokenizer, options.max_length)


def _paper(prompt: str, response: str, tokenizer: Any, max_length: int) -> Encoding:
    text = prompt + response
    whole = tokenizer.encode(text, verbose=False)
    token_ids = tokenizer.encode(text, truncation=True, max_length=max_length)
    prefix = text[: text.rfind(response)]
    num_prefix = len(tokenizer.encode(prefix, verbose=False)) if prefix else 0
    targets = list(range(max(num_prefix, 1), len(token_ids)))
    reason = None
    if response == "":
        reason = tokens.EMPTY_RESPONSE
    elif num_prefix >= max_length:
        reason = tokens.PROMPT_FILLS
    elif not targets:
        reason = tokens.NO_RESPONSE_TOKEN
    return Encoding(token_ids, [] if reason else targets, len(whole) > len(token_ids), reason)


def _given(example: Example, max_length: int) -> Encoding:
    assert example.given is not None
    ids, counts = example.given.token_ids, example.given.targets
    targets = [t for t in range(1, min(len(ids), max_length)) if counts[t]]
    reason = None
    if not targets:
        beyond = any(counts) and not any(counts[:max_length])
        reason = tokens.PROMPT_FILLS if beyond else tokens.NO_RESPONSE_TOKEN
    return Encoding(list(ids[:max_length]), targets, len(ids) > max_length, reason)


# Conversations


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates get it: without nulls, its reasoning by each name that they know."""
    turn = {"role": message.role, "content": message.content} | dict(message.more)
    turn = {name: value for name, value in turn.items() if value is not None}
    thoughts = [turn[name] for name in _REASONING if name in turn]
    if thoughts:
        turn["reasoning_content"] = thoughts[0]
        turn.setdefault("thinking", thoughts[0])
    return turn


def _template_options(example: Example, tokenizer: Any, date: str | None) -> dict[str, Any]:
    options = {name: value for name, value in example.template_values.items() if value is not None}
    template = tokenizer.get_chat_template(None, options.get("tools"))
    if date is not None:
        day = datetime.datetime.fromisoformat(date)
        # Each use in the template prints that day, as if it were today.
        template = re.sub(
            r"""strftime_now\(\s*(["'])(.+?)\1\s*\)""",
            lambda use: repr(day.strftime(use[2])),
            template,
        )
    return options | {"tokenize": False, "chat_template": template}


def _prompt_turns(
    example: Example, tokenizer: Any, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """The prompt's turns, and what the template makes of them."""
    turns = [_turn(m) for m in example.messages]
    asked = {"add_generation_prompt": True} | options
    if not {turn["role"] for turn in turns} & {"system", "developer"}:
        system = {"role": "system", "content": "You are a helpful assistant."}
        # A template without a system role raises. Then there is only the user's turn.
        with contextlib.suppress(jinja2.TemplateError):
            return [system, *turns], tokenizer.apply_chat_template([system, *turns], **asked)
    return turns, tokenizer.apply_chat_template(turns, **asked)


def _prompt_and_response(example: Example, tokenizer: Any, date: str | None) -> tuple[str, str]:
    options = _template_options(example, tokenizer, date)
    turns, prompt = _prompt_turns(example, tokenizer, options)
    if example.reply is None:
        return prompt, example.response
    # More than text: what the whole conversation has behind the prompt, less what ends any reply.
    whole = tokenizer.apply_chat_template([*turns, _turn(example.reply)], **options)
    text_alone = {"role": "assistant", "content": example.response}
    if whole == tokenizer.apply_chat_template([*turns, text_alone], **options):
        return prompt, example.response
    some_reply = {"role": "assistant", "content": _ANY_TEXT}
    header, closing = tokenizer.apply_chat_template([*turns, some_reply], **options).split(
        _ANY_TEXT
    )
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) : len(whole) - len(closing)]
    # The template opens the reply otherwise than it renders one (`<think>`), or the turns before it. Then
    # what stands behind the prompt's last text tells the reply's header.
    asked = example.messages[-1].content.strip()
    header, cut = (text.rpartition(asked)[2] for text in (header, prompt))
    if not header or not (cut.startswith(header) or header.startswith(cut)):
        raise UserError(
            f"record {example.index}: the reference does not find the reply in the rendered conversation; "
            "use --chat=no"
        )
    _, _, reply = whole.partition(asked + header[: len(cut)])
    return prompt, reply[: len(reply) - len(closing)]


def _num_common(one: str, other: str) -> int:
    """How many leading characters two texts have in common."""
    limit = min(len(one), len(other))
    return next((n for n in range(limit) if one[n] != other[n]), limit)


def _clean(example: Example, tokenizer: Any, options: AnalyzeOptions, chat: bool) -> Encoding:
    ours = tokens.tokenize(example, tokenizer, options.protocol_for(tokenizer))
    found = Encoding(ours.token_ids.tolist(), ours.targets.tolist(), ours.truncated, ours.reason)
    if not (chat and example.messages) or found.reason is not None:
        return found
    settings = _template_options(example, tokenizer, options.date)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", settings["chat_template"]):
        return found
    own, marked = _marked_tokens(example, tokenizer, settings, options.turns)
    # At most a BOS stands in front of the conversation's own tokens.
    kept = found.token_ids
    in_front = next(n for n in range(len(kept)) if kept[n:] == own[: len(kept) - n])
    moved = (t + in_front for t in marked)
    return found._replace(targets=[t for t in moved if 0 < t < len(kept)])


def _marked_tokens(
    example: Example, tokenizer: Any, settings: dict[str, Any], which: str
) -> tuple[list[int], list[int]]:
    """The conversation's own tokens, and those among them that hold a character of the template's marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns, prompt = _prompt_turns(example, tokenizer, settings)
    reply = _turn(example.reply or Message("assistant", example.response))
    asked = {"tools": None, "documents": None} | tokenizer.special_tokens_map | settings
    del asked["tokenize"]
    # Its annotation says str, but it gives two lists.
    rendered: Any = render_jinja_template(
        conversations=[[*turns, reply]], return_assistant_tokens_mask=True, **asked
    )
    (text,), (spans,) = rendered
    behind = _num_common(prompt, text) if which == "last" else 0
    is_marked = [False] * len(text)
    for begin, end in spans:
        if end > behind:
            is_marked[begin:end] = [True] * (end - begin)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = enumerate(encoded["offset_mapping"])
    return encoded["input_ids"], [t for t, (begin, end) in pairs if any(is_marked[begin:end])]
