r"""An example -> token ids and targets, by one of two protocols.

`data.passages` makes the text; docs/tokens.md shows each form token by token.

| | `paper`: exactly the authors' | `clean`: ours |
|---|---|---|
| text of a conversation | the rendered prompt + response, without the template's end of turn | the rendered conversation, with it (until 2026-11: without) |
| added tokens | all that the tokenizer adds: two BOS if the template prints one too, and an EOS if the tokenizer appends one, also after a truncated text | only those in front, and none if the text starts with one: at most one BOS |
| start of the response | token count of the prefix, encoded by itself | first token that holds a character of the response, by character offsets |
| token across the boundary | prompt; if it covers several tokens of the prefix, response tokens after it are masked too | response |
| EOS that the tokenizer appends | counted in the prefix, so it masks one more response token; and is itself a target | not there |
| several turns of the assistant's | the last one | the last one, or all with --turns=all |

Truncation cuts on the right. A truncated text fills `max_length`, so a response loses all its tokens only if
the prompt fills `max_length` by itself.

Some tokenizers trim spaces from their offsets (RoBERTa's `trim_offsets`). This can hide that a token of white
space crosses the boundary; `clean` then counts it as prompt.
"""  # noqa: E501 (a table row cannot be wrapped)

import datetime
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from jaxgrad.data.chat_template import ChatTemplate, Span
from jaxgrad.data.examples import Example, GivenTokens
from jaxgrad.data.passages import Passage, ProtocolName, Renderer, Turns, plain_passage
from jaxgrad.errors import UserError, is_panic

# Why an example is not measured. Do not reword: results store these words.
EMPTY_RESPONSE = "empty response"
PROMPT_FILLS = "prompt fills max_length"
NO_RESPONSE_TOKEN = "no response token of its own"

FIRST_IS_TARGET = (
    "the first token is given as a target, but nothing comes before to predict it from"
)


def read_date(text: str) -> datetime.date:
    """A day as YYYY-MM-DD.

    Raises:
        UserError: The text is no such day.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--date={text} is not a day; give it as YYYY-MM-DD") from error


@dataclass(frozen=True)
class Protocol:
    """How a text becomes tokens.

    Attributes:
        name: `paper` or `clean`; the module's docstring compares them.
        chat: Whether the prompt is rendered by the tokenizer's chat template.
        max_length: Tokens kept, special ones included; at least 2, one to predict from and one to predict.
        date: The day, for templates that print it (Llama 3.2, SmolLM3); None for today, as in transformers.
        turns: Whether the last turn of the assistant's is measured, or all of them.
    """

    name: ProtocolName = "paper"
    chat: bool = False
    max_length: int = 1024
    date: datetime.date | None = None
    turns: Turns = "last"

    def __post_init__(self) -> None:
        if self.name not in get_args(ProtocolName):
            raise UserError(f"--protocol={self.name} is unknown; use paper or clean")
        if self.turns not in get_args(Turns):
            raise UserError(f"--turns={self.turns} is unknown; use last or all")
        if self.turns == "all" and self.name == "paper":
            raise UserError(
                "--turns=all does not go with --protocol=paper, which measures the last turn; add "
                "--protocol=clean"
            )
        if self.max_length < 2:
            raise UserError(f"--max_length={self.max_length} leaves no token to predict; give >= 2")


@dataclass(frozen=True, eq=False)  # eq would compare arrays, which have no truth value
class TokenizedExample:
    """Token ids and the targets among them.

    Target t is predicted at position t - 1. Always `num_prompt_tokens + num_response_tokens == num_tokens`.

    Attributes:
        example: The source of the tokens.
        token_ids: int32 [T], T <= max_length, truncated on the right.
        targets: int32 [S], positions in T whose loss counts: ascending, from 1 on, because nothing predicts
            token 0. They may have gaps. None where the example cannot be measured.
        truncated: Whether tokens were cut off.
        reason: Why it cannot be measured, one of this module's constants; None if it can.
        notes: What the user should know of its text, see `data.passages.Passage`.
    """

    example: Example
    token_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    truncated: bool
    reason: str | None
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens after truncation, T."""
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        """Number of targets, S."""
        return len(self.targets)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are no targets."""
        return self.num_tokens - self.num_response_tokens

    @property
    def measurable(self) -> bool:
        """Whether there is a target."""
        return self.reason is None


def tokenize_all(
    examples: Iterable[Example], tokenizer: Any, protocol: Protocol
) -> list[TokenizedExample]:
    """`tokenize` for each example, in order, also for those that cannot be measured."""
    encoder = _Encoder(tokenizer, protocol)
    return [encoder.encode(example) for example in examples]


def tokenize(example: Example, tokenizer: Any, protocol: Protocol) -> TokenizedExample:
    """Encodes one example.

    Args:
        example: The prompt and the response.
        tokenizer: A `transformers` tokenizer; `clean` needs a fast one, for its offsets.
        protocol: How the text becomes tokens.

    Returns:
        Ids and targets. The reason is the first that holds:

        | case | reason |
        |---|---|
        | the response is "", and nothing else is rendered of the reply | `EMPTY_RESPONSE` |
        | what comes before the first target has max_length tokens or more | `PROMPT_FILLS` |
        | no target is left: the response merges into the prompt's last token, encodes to nothing, or the text has one token | `NO_RESPONSE_TOKEN` |

    Raises:
        UserError: There is no chat template, it fails, or it hides the response's place; the tokenizer
            truncates on the left (`paper`) or gives no offsets (`clean`).
    """  # noqa: E501 (a table row cannot be wrapped)
    return _Encoder(tokenizer, protocol).encode(example)


def count_notes(tokenized: Sequence[TokenizedExample]) -> dict[str, int]:
    """What the user should know of the texts -> of how many examples, most frequent first."""
    counts = Counter(note for item in tokenized for note in item.notes)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


class _Encoder:
    """Encodes a run's examples."""

    def __init__(self, tokenizer: Any, protocol: Protocol) -> None:
        self._tokenizer = tokenizer
        self._protocol = protocol
        self._renderer: Renderer | None = None

    def encode(self, example: Example) -> TokenizedExample:
        if example.given is not None:
            return _given(example, example.given, self._protocol.max_length)
        passage, max_length = self._passage(example), self._protocol.max_length
        encode = _encode_paper if self._protocol.name == "paper" else _encode_clean
        try:
            ids, targets, length = encode(passage, self._tokenizer, max_length)
            token_ids = np.asarray(ids, dtype=np.int32)
        except UserError:
            raise
        except BaseException as error:  # untrusted files may make transformers raise anything
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            detail = (str(error) or type(error).__name__)[:300]
            raise UserError(
                f"record {example.index}: the tokenizer fails ({type(error).__name__}: {detail}); "
                "download its files (tokenizer.json, tokenizer_config.json) again"
            ) from error
        reason = EMPTY_RESPONSE if passage.is_empty else None
        return _tokenized(example, token_ids, targets, length, max_length, reason, passage.notes)

    def _passage(self, example: Example) -> Passage:
        if not self._protocol.chat or not example.messages:
            return plain_passage(example, self._protocol.turns)
        if self._renderer is None:
            template = ChatTemplate(self._tokenizer, self._protocol.date)
            self._renderer = Renderer(template, self._protocol.name, self._protocol.turns)
        return self._renderer.passage(example)


def _tokenized(
    example: Example,
    token_ids: NDArray[np.int32],
    targets: Sequence[int],
    length: int,
    max_length: int,
    reason: str | None,
    notes: tuple[str, ...],
) -> TokenizedExample:
    """An example with the targets that truncation leaves, and why it has none.

    Args:
        example: The source.
        token_ids: Truncated.
        targets: Positions in the text before that, ascending.
        length: Tokens before that.
        max_length: The protocol's.
        reason: If it is known already.
        notes: For the user.
    """
    left = [position for position in targets if 0 < position < len(token_ids)]
    if reason is None:
        first = targets[0] if targets else length
        if first >= max_length:
            reason = PROMPT_FILLS
        elif not left:
            reason = NO_RESPONSE_TOKEN
    targets_S = np.asarray([] if reason else left, np.int32)
    return TokenizedExample(example, token_ids, targets_S, length > len(token_ids), reason, notes)


def _given(example: Example, given: GivenTokens, max_length: int) -> TokenizedExample:
    """Tokens of the record's own, as they are."""
    for position, token in enumerate(given.token_ids):
        if not 0 <= token < 2**31:
            raise UserError(
                f"record {example.index}: token {position} is {token}, which is no token's id; give "
                "whole numbers from 0 on"
            )
    targets = [position for position, counts in enumerate(given.targets) if counts]
    notes = (FIRST_IS_TARGET,) if targets[:1] == [0] else ()
    token_ids = np.asarray(given.token_ids[:max_length], np.int32)
    length = len(given.token_ids)
    # Without any target the prompt is not what fills the text.
    reason = None if targets else NO_RESPONSE_TOKEN
    return _tokenized(example, token_ids, targets, length, max_length, reason, notes)


def _encode_paper(
    passage: Passage, tokenizer: Any, max_length: int
) -> tuple[list[int], Sequence[int], int]:
    """Ids, targets and the number of tokens before truncation; by the authors' calls."""
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise UserError(
            f"the tokenizer truncates on the {tokenizer.truncation_side}, which would cut off the "
            'prompt; set "truncation_side": "right" in its tokenizer_config.json'
        )
    # verbose=False: no warning about texts beyond the model's limit, because they are cut.
    full_length = len(tokenizer.encode(passage.text, verbose=False))
    ids = tokenizer.encode(passage.text, truncation=True, max_length=max_length)
    begin = passage.spans[0][0]
    if begin == 0:  # plain text has no prompt
        return ids, range(full_length), full_length
    response = passage.text[begin:]
    prefix = passage.text[: passage.text.rfind(response)]
    num_prompt = len(tokenizer.encode(prefix, verbose=False))
    # The prefix may have as many tokens as the text, or more; it is what fills it even then.
    return ids, range(num_prompt, max(full_length, num_prompt + 1)), full_length


def _encode_clean(
    passage: Passage, tokenizer: Any, max_length: int
) -> tuple[list[int], Sequence[int], int]:
    """Ids, targets and the number of tokens before truncation; by character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--protocol=clean takes offsets of a fast tokenizer; use --protocol=paper")
    encoding = tokenizer(
        passage.text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    # The mask marks tokens that the tokenizer added, not special tokens written in the text.
    own = [i for i, added in enumerate(encoding["special_tokens_mask"]) if not added]
    begin, end = (own[0], own[-1] + 1) if own else (0, 0)
    added_front = encoding["input_ids"][:begin]
    ids = encoding["input_ids"][begin:end]
    targets = _tokens_in(passage.spans, encoding["offset_mapping"][begin:end])
    if passage.spans[0] == (0, len(passage.text)):
        targets = list(range(len(ids)))  # also those without a character
    if not ids or ids[0] not in added_front:
        ids = added_front + ids
        targets = [len(added_front) + position for position in targets]
    return ids[:max_length], targets, len(ids)


def _tokens_in(spans: Sequence[Span], offsets: Sequence[Span]) -> list[int]:
    """The tokens that hold a character of a span, as in transformers' mask of the assistant's tokens.

    Args:
        spans: Ascending and apart.
        offsets: Each token's first character and the one behind its last.
    """
    found, left, previous_end = [], list(spans), 0
    for position, (start, stop) in enumerate(offsets):
        # An offset without its spaces may be empty, but its end is still the token's.
        if start == stop:
            start = min(start, previous_end)
        previous_end = stop
        while left and start >= left[0][1]:
            left.pop(0)
        if left and stop > left[0][0]:
            found.append(position)
    return found


def tokens_digest(tokenized: Iterable[TokenizedExample]) -> str:
    """sha256 over all tokens and targets. Runs with the same digest measure the same text."""
    digest = hashlib.sha256()
    for item in tokenized:
        digest.update(f"{item.example.index} {item.num_prompt_tokens} {item.reason} ".encode())
        digest.update(item.token_ids.astype("<i4").tobytes())
        # Targets up to the end are told by their number. Runs before there were others have this digest.
        if not np.array_equal(item.targets, np.arange(item.num_prompt_tokens, item.num_tokens)):
            digest.update(b"targets" + item.targets.astype("<i4").tobytes())
    return digest.hexdigest()
