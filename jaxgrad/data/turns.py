"""Where the assistant's turns stand in a rendered conversation, in characters.

A turn's stretch begins behind its header, where the generation prompt ends and the model would write on. It
ends with what the template prints behind a turn (`<|im_end|>`). Where the template marks what the assistant
writes (`{% generation %}`), its marks are taken instead.

The begin of a turn is, by the first of these that holds:

1. The end of the rendered prompt, where the rendered conversation begins with it.
2. The end of the header that the rendered prompt and a plain reply have in common, up to the reply's first
   character. So a generation prompt that ends with `<think>` ends at the header before it, where the
   conversation goes on otherwise.
3. The same, but compared from the last text of the prompt on, for templates that render the turns before
   it otherwise when a reply follows (Mistral 7B v0.3 prints the system message with the last turn only).
4. The first token of the conversation that is another one in the prompt, as in TRL, if it stands behind the
   last text of the prompt.

The end of a turn that is not the last is that of the conversation rendered up to it, where the whole one
begins with it. Else it is found by the texts behind the turn's content; where a last turn closes otherwise
than an earlier one (Phi-3 adds an end of text), what both have in common up to a special token.

A place that none of these finds exactly is refused. The place of a content is found by a character that no
text has (`_unused`), put behind it or in its place.
"""

from collections.abc import Sequence

from jaxgrad.data.chat_template import Conversation, Span, Turn
from jaxgrad.errors import UserError


def assistant_spans(talk: Conversation, which: str) -> list[Span]:
    """The stretches of the whole conversation that the assistant wrote.

    Args:
        talk: Its whole rendering is there.
        which: "last" for the reply alone, "all" for every turn of the assistant's.

    Returns:
        Begins and ends, ascending and apart.

    Raises:
        UserError: They cannot be told exactly.
    """
    if talk.template.has_marks(talk.values):
        spans = _marked_spans(talk)
        return _of_the_reply(talk, spans) if which == "last" else spans
    turns = [*talk.turns, talk.reply]
    wanted = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if which == "last":
        wanted = wanted[-1:]
    return [(_begin(talk, i), _end(talk, i)) for i in wanted]


def reply_begin(talk: Conversation) -> int:
    """Where the reply begins in the whole conversation.

    Raises:
        UserError: It cannot be told exactly.
    """
    return _begin(talk, len(talk.turns))


def reply_without_closing(talk: Conversation) -> str:
    """The reply as the template renders it, without what it prints behind any turn's text.

    Raises:
        UserError: It cannot be told exactly.
    """
    begin = reply_begin(talk)
    mark = _unused(talk)
    closing = talk.render([*talk.turns, _plain(mark)]).rpartition(mark)[2]
    if not talk.whole.endswith(closing) or begin + len(closing) > len(talk.whole):
        raise _cannot_tell(talk, len(talk.turns), "ends")
    return talk.whole[begin : len(talk.whole) - len(closing)]


def renders_text_alone(talk: Conversation) -> bool:
    """Whether the reply renders as its text would, without its other fields."""
    return talk.whole == talk.render([*talk.turns, _plain(talk.example.response)])


def renders_nothing(talk: Conversation) -> bool:
    """Whether the reply renders as one without any text."""
    empty = _plain("")
    return talk.reply == empty or talk.whole == talk.render([*talk.turns, empty])


def _plain(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def _unused(talk: Conversation, also: str = "") -> str:
    """A character of the private use area that no text of the conversation has."""
    used = talk.whole + talk.prompt + also
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


# Marks


def _marked_spans(talk: Conversation) -> list[Span]:
    """What the template's own marks cover, empty ones left out."""
    whole, spans = talk.template.render_with_marks([*talk.turns, talk.reply], talk.values)
    spans = [(begin, end) for begin, end in spans if begin < end]
    # transformers counts characters while it renders, which goes wrong in a macro.
    text = talk.reply.get("content", "").strip()
    is_covered = text not in whole or any(text in whole[begin:end] for begin, end in spans)
    if whole != talk.whole or not spans or not is_covered:
        raise UserError(
            f"{_where(talk)}: the chat template's {{% generation %}} marks do not cover the last turn's "
            "text; correct the template, or use --protocol=paper"
        )
    return spans


def _of_the_reply(talk: Conversation, spans: Sequence[Span]) -> list[Span]:
    try:
        begin = reply_begin(talk)
    except UserError:
        # The marks of the prompt alone are those before the reply's, if they cover the same texts.
        prompt, before = talk.template.render_with_marks(talk.turns, talk.values)
        texts = [prompt[b:e] for b, e in before if b < e]
        if texts != [talk.whole[b:e] for b, e in spans[: len(texts)]]:
            raise
        return list(spans[len(texts) :])
    return [span for span in spans if span[1] > begin]


# Without marks


def _begin(talk: Conversation, i: int) -> int:
    """Where turn i, the assistant's, begins in the whole conversation."""
    before = [*talk.turns, talk.reply][:i]
    mark = _unused(talk)
    try:
        header, found, _ = talk.render([*before, _plain(mark)]).partition(mark)
        if not found:
            raise _cannot_tell(talk, i, "begins")
        prompt = header
        if before:
            is_last = i == len(talk.turns)
            prompt = talk.prompt if is_last else talk.render(before, generation_prompt=True)
        if talk.whole.startswith(prompt):
            return len(prompt)
        if prompt.startswith(header) and talk.whole.startswith(header):
            return len(header)
        return _begin_behind_the_last_text(talk, i, prompt, mark)
    except UserError:
        raise
    except Exception as error:  # a template is a program, which may raise anything
        raise _cannot_tell(talk, i, "begins") from error


def _begin_behind_the_last_text(talk: Conversation, i: int, prompt: str, mark: str) -> int:
    """The begin by what follows the content of the turn before, in the prompt and in the conversation."""
    turns = [*talk.turns, talk.reply]
    text_end = _text_end(talk, i - 1, mark)
    marked = [*turns[: i - 1], _with_mark(turns[i - 1], mark)]
    tail = talk.render(marked, generation_prompt=True).rpartition(mark)[2]
    if talk.whole.startswith(tail, text_end):
        return text_end + len(tail)
    reply = _unused(talk, mark)
    whole = talk.render([*marked, _plain(reply), *turns[i + 1 :]])
    header = whole.partition(mark)[2].partition(reply)[0]
    if tail.startswith(header) and talk.whole.startswith(header, text_end):
        return text_end + len(header)
    begin = _first_other_token(talk, prompt)
    if begin < text_end:
        raise _cannot_tell(talk, i, "begins")
    return begin


def _first_other_token(talk: Conversation, prompt: str) -> int:
    """Where the first token of the whole conversation begins that is another one in a prompt."""
    tokenizer = talk.template.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return 0
    in_prompt = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    found = tokenizer(
        talk.whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    pairs = zip(found["input_ids"], in_prompt, strict=False)
    other = next((n for n, (one, two) in enumerate(pairs) if one != two), len(in_prompt))
    offsets = found["offset_mapping"]
    return offsets[other][0] if other < len(offsets) else len(talk.whole)


def _end(talk: Conversation, i: int) -> int:
    """Where turn i, the assistant's, ends in the whole conversation."""
    if i == len(talk.turns):
        return len(talk.whole)
    turns = [*talk.turns, talk.reply]
    try:
        until = talk.render(turns[: i + 1])
        if talk.whole.startswith(until):
            return len(until)
        mark = _unused(talk)
        text_end = _text_end(talk, i, mark)
        closing = talk.render([*turns[:i], _with_mark(turns[i], mark)]).rpartition(mark)[2]
        rest = talk.whole[text_end:]
        if rest.startswith(closing):
            return text_end + len(closing)
        # The last turn of all may close otherwise (Phi-3 adds an end of text). What both closings have in
        # common counts, if the one goes on with a special token, which cannot be cut.
        pairs = zip(rest, closing, strict=False)
        common = next(n for n, (one, other) in enumerate(pairs) if one != other)
        for token in talk.template.tokenizer.get_added_vocab():
            for begin in range(max(0, common - len(token) + 1), common + 1):
                if closing.startswith(token, begin):
                    return text_end + begin
    except UserError:
        raise
    except Exception as error:  # a template is a program, which may raise anything
        raise _cannot_tell(talk, i, "ends") from error
    raise _cannot_tell(talk, i, "ends")


def _with_mark(turn: Turn, mark: str) -> Turn:
    return turn | {"content": turn.get("content", "") + mark}


def _text_end(talk: Conversation, i: int, mark: str) -> int:
    """Where the content of turn i ends in the whole conversation.

    Raises:
        ValueError: A mark behind the content does not show it.
    """
    turns = [*talk.turns, talk.reply]
    marked = talk.render([*turns[:i], _with_mark(turns[i], mark), *turns[i + 1 :]])
    before, _, rest = marked.rpartition(mark)
    end = len(talk.whole) - len(rest)
    # White space at the content's end stands before the mark, even where the template trims it.
    if marked.count(mark) != 1 or before.rstrip() != talk.whole[:end].rstrip():
        raise ValueError(f"the content of turn {i} is not found")
    if not talk.whole.endswith(rest):
        raise ValueError(f"the content of turn {i} is not found")
    return end


def _where(talk: Conversation) -> str:
    return f"record {talk.example.index}"


def _cannot_tell(talk: Conversation, i: int, what: str) -> UserError:
    return UserError(
        f"{_where(talk)}: the chat template renders turn {i} so that one cannot tell where it {what}; use "
        "--chat=no, or put {% generation %} marks into the template and use --protocol=clean"
    )
