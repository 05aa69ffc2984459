r"""An example -> token ids and the response's span, by one of two protocols.

Both render the same text. Base model: instruction + "\n" + response. Instruct model: the chat template with
its generation prompt + response. No end-of-sequence token is appended.

| | `paper`: exactly the authors' | `clean`: ours |
|---|---|---|
| added tokens | all that the tokenizer adds: two BOS if the template prints one too, and an EOS if the tokenizer appends one, also after a truncated text | only those in front, and none if the text starts with one: at most one BOS |
| start of the response | token count of the prefix, encoded by itself | first token that holds a character of the response, by character offsets |
| token across the boundary | prompt; if it covers several tokens of the prefix, response tokens after it are masked too | response |
| EOS that the tokenizer appends | counted in the prefix, so it masks one more response token; and is itself a target | not there |

Truncation cuts on the right. A truncated text fills `max_length`, so a response loses all its tokens only if
the prompt fills `max_length` by itself.

Some tokenizers trim spaces from their offsets (RoBERTa's `trim_offsets`). This can hide that a token of white
space crosses the boundary; `clean` then counts it as prompt.
"""  # noqa: E501 (a table row cannot be wrapped)

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jaxgrad.data.chat_template import render_prompt
from jaxgrad.data.examples import Example
from jaxgrad.errors import UserError, is_panic

# Why an example is not measured. Do not reword: results store these words.
EMPTY_RESPONSE = "empty response"
PROMPT_FILLS = "prompt fills max_length"
NO_RESPONSE_TOKEN = "no response token of its own"


ProtocolName = Literal["paper", "clean"]


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
    """

    name: ProtocolName = "paper"
    chat: bool = False
    max_length: int = 1024
    date: datetime.date | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ProtocolName):
            raise UserError(f"--protocol={self.name} is unknown; use paper or clean")
        if self.max_length < 2:
            raise UserError(f"--max_length={self.max_length} leaves no token to predict; give >= 2")


@dataclass(frozen=True, eq=False)  # eq would compare arrays, which have no truth value
class TokenizedExample:
    """Token ids and the response's span.

    The targets are `token_ids[num_prompt_tokens:]`, predicted at positions `num_prompt_tokens - 1` to
    `num_tokens - 2`. Always `num_prompt_tokens + num_response_tokens == num_tokens`.

    Attributes:
        example: The source of the tokens.
        token_ids: int32 [T], T <= max_length, truncated on the right.
        num_prompt_tokens: Tokens that are not targets; at least 1, because nothing predicts token 0.
        truncated: Whether tokens were cut off.
        reason: Why it cannot be measured, one of this module's constants; None if it can. The counts hold
            either way.
    """

    example: Example
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    truncated: bool
    reason: str | None

    @property
    def num_tokens(self) -> int:
        """Tokens after truncation, T."""
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        """Number of targets."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def measurable(self) -> bool:
        """Whether at least one target belongs to the response."""
        return self.reason is None


def tokenize_all(
    examples: Iterable[Example], tokenizer: Any, protocol: Protocol
) -> list[TokenizedExample]:
    """`tokenize` for each example, in order, also for those that cannot be measured."""
    return [tokenize(example, tokenizer, protocol) for example in examples]


def tokenize(example: Example, tokenizer: Any, protocol: Protocol) -> TokenizedExample:
    """Encodes one example.

    Args:
        example: The prompt and the response.
        tokenizer: A `transformers` tokenizer; `clean` needs a fast one, for its offsets.
        protocol: How the text becomes tokens.

    Returns:
        Ids and span. The reason is the first that holds:

        | case | reason |
        |---|---|
        | the response is "" | `EMPTY_RESPONSE` |
        | the prompt has max_length tokens or more | `PROMPT_FILLS` |
        | no target is left: the response merges into the prompt's last token, encodes to nothing, or the text has one token | `NO_RESPONSE_TOKEN` |

    Raises:
        UserError: There is no chat template or it fails; the tokenizer truncates on the left
            (`paper`) or gives no offsets (`clean`).
    """  # noqa: E501 (a table row cannot be wrapped)
    if protocol.chat:
        text = render_prompt(example, tokenizer, protocol.date) + example.response
    else:
        text = f"{example.instruction}\n{example.response}"
    encode = _encode_paper if protocol.name == "paper" else _encode_clean
    try:
        ids, num_prompt, truncated = encode(text, example.response, tokenizer, protocol.max_length)
        token_ids = np.asarray(ids, dtype=np.int32)
    except UserError:
        raise
    except BaseException as error:  # untrusted tokenizer files may make transformers raise anything
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        detail = (str(error) or type(error).__name__)[:300]
        raise UserError(
            f"record {example.index}: the tokenizer fails ({type(error).__name__}: {detail}); download "
            "its files (tokenizer.json, tokenizer_config.json) again"
        ) from error
    num_prompt_tokens = min(max(num_prompt, 1), len(ids))
    reason = None
    if not example.response:
        reason = EMPTY_RESPONSE
    elif num_prompt >= protocol.max_length:
        reason = PROMPT_FILLS
    elif num_prompt_tokens == len(ids):
        reason = NO_RESPONSE_TOKEN
    return TokenizedExample(example, token_ids, num_prompt_tokens, truncated, reason)


def _encode_paper(
    text: str, response: str, tokenizer: Any, max_length: int
) -> tuple[list[int], int, bool]:
    """Ids, the prompt's token count, whether ids were cut off; by the authors' calls."""
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise UserError(
            f"the tokenizer truncates on the {tokenizer.truncation_side}, which would cut off the "
            'prompt; set "truncation_side": "right" in its tokenizer_config.json'
        )
    # verbose=False: no warning about texts beyond the model's limit, because they are cut.
    full_length = len(tokenizer.encode(text, verbose=False))
    ids = tokenizer.encode(text, truncation=True, max_length=max_length)
    prefix = text[: text.rfind(response)]
    return ids, len(tokenizer.encode(prefix, verbose=False)), full_length > len(ids)


def _encode_clean(
    text: str, response: str, tokenizer: Any, max_length: int
) -> tuple[list[int], int, bool]:
    """Ids, the prompt's token count, whether ids were cut off; by character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--protocol=clean takes offsets of a fast tokenizer; use --protocol=paper")
    encoding = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    # The mask marks tokens that the tokenizer added, not special tokens written in the text.
    own = [i for i, added in enumerate(encoding["special_tokens_mask"]) if not added]
    begin, end = (own[0], own[-1] + 1) if own else (0, 0)
    added_front = encoding["input_ids"][:begin]
    ids = encoding["input_ids"][begin:end]
    # Ends only: an offset without its spaces may be empty, but its end is still the token's.
    ends = [stop for _, stop in encoding["offset_mapping"][begin:end]]
    response_begin = len(text) - len(response)
    num_prompt = next((i for i, stop in enumerate(ends) if stop > response_begin), len(ids))
    if not ids or ids[0] not in added_front:
        ids = added_front + ids
        num_prompt += len(added_front)
    return ids[:max_length], num_prompt, len(ids) > max_length


def tokens_digest(tokenized: Iterable[TokenizedExample]) -> str:
    """sha256 over all tokens and spans. Runs with the same digest measure the same text."""
    digest = hashlib.sha256()
    for item in tokenized:
        digest.update(f"{item.example.index} {item.num_prompt_tokens} {item.reason} ".encode())
        digest.update(item.token_ids.astype("<i4").tobytes())
    return digest.hexdigest()
