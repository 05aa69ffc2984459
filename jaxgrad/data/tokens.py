r"""Stage 2: an example -> token ids and the response's span, by one of two protocols.

Both render the same text: instruction + "\n" + response for a base model; the chat template with
its generation prompt + response for an instruct model. No end-of-sequence token is appended to it.

| | `paper`: the authors', to the letter | `clean`: ours |
|---|---|---|
| added tokens | all that the tokenizer adds: with a template that prints a BOS there are two, and a tokenizer that appends an EOS appends it, also behind a truncated text | those in front only, and none of them if the text opens with one already: one BOS at most |
| start of the response | the token count of the prefix, encoded by itself | the first token that holds a character of the response, by character offsets |
| token that straddles the boundary | prompt; if it swallows several tokens of the prefix, response tokens after it are masked too | response |
| EOS that the tokenizer appends | counted in the prefix, so it masks one more response token, and is a target itself | not there |

Truncation keeps the left. A text that is truncated fills `max_length`, so a response loses all its
tokens only to a prompt that fills `max_length` by itself: there is no third reason "lost by truncation".

Offsets of a tokenizer that trims spaces from them (RoBERTa's `trim_offsets`) can hide that a token of
white space straddles the boundary; `clean` then counts that token as prompt.
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

# Why an example is not measured. Results store these words: do not reword them.
EMPTY_RESPONSE = "empty response"
PROMPT_FILLS = "prompt fills max_length"
NO_RESPONSE_TOKEN = "no response token of its own"


ProtocolName = Literal["paper", "clean"]


def read_date(text: str) -> datetime.date:
    """A day as YYYY-MM-DD.

    Raises:
        UserError: It is none.
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
        max_length: Tokens kept, special ones included; at least 2, one to predict from and one
            to predict.
        date: The day that templates print which ask for one (Llama 3.2, SmolLM3);
            None for today, as transformers has it.
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


@dataclass(frozen=True, eq=False)  # eq: arrays have no truth value to compare by
class TokenizedExample:
    """Token ids and the response's span.

    The targets are `token_ids[num_prompt_tokens:]`, predicted at positions `num_prompt_tokens - 1`
    to `num_tokens - 2`. Token 0 has nothing before it and is never a target, so `num_prompt_tokens`
    is at least 1, also where the prompt encodes to nothing. It is cut to `num_tokens`, so that
    always `num_prompt_tokens + num_response_tokens == num_tokens`.

    Attributes:
        example: Where the tokens come from.
        token_ids: int32 [T], T <= max_length, truncated on the right.
        num_prompt_tokens: Tokens that are not targets.
        truncated: Whether tokens were cut off.
        reason: Why it cannot be measured, one of this module's constants; None if it can. The
            counts hold either way.
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
        """Targets: the tokens whose loss is averaged."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def measurable(self) -> bool:
        """Whether there is at least one target that belongs to the response."""
        return self.reason is None


def tokenize_all(
    examples: Iterable[Example], tokenizer: Any, protocol: Protocol
) -> list[TokenizedExample]:
    """`tokenize` for each example, in order; those that cannot be measured stay in the list."""
    return [tokenize(example, tokenizer, protocol) for example in examples]


def tokenize(example: Example, tokenizer: Any, protocol: Protocol) -> TokenizedExample:
    """Encodes one example.

    Args:
        example: The prompt and the response.
        tokenizer: A `transformers` tokenizer; `clean` needs a fast one, for the offsets.
        protocol: How.

    Returns:
        Ids and span. The reason, if any, is the first that holds:

        | case | reason |
        |---|---|
        | the response is "" | `EMPTY_RESPONSE` |
        | the prompt has max_length tokens or more | `PROMPT_FILLS` |
        | no target is left: the response merges into the prompt's last token, encodes to nothing, or is all of a text of one token | `NO_RESPONSE_TOKEN` |

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
    except BaseException as error:  # whatever a stranger's tokenizer files make of transformers
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        told = (str(error) or type(error).__name__)[:300]
        raise UserError(
            f"record {example.index}: the tokenizer fails ({type(error).__name__}: {told}); download "
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
    """Returns what `_encode_clean` does, by the authors' calls."""
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise UserError(
            f"the tokenizer truncates on the {tokenizer.truncation_side}, which would cut off the "
            'prompt; set "truncation_side": "right" in its tokenizer_config.json'
        )
    # verbose=False: a text longer than the model's own limit is no news here, it is cut.
    full_length = len(tokenizer.encode(text, verbose=False))
    ids = tokenizer.encode(text, truncation=True, max_length=max_length)
    prefix = text[: text.rfind(response)]
    return ids, len(tokenizer.encode(prefix, verbose=False)), full_length > len(ids)


def _encode_clean(
    text: str, response: str, tokenizer: Any, max_length: int
) -> tuple[list[int], int, bool]:
    """Returns ids, the prompt's token count, whether ids were cut off."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--protocol=clean takes offsets of a fast tokenizer; use --protocol=paper")
    encoding = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    # The mask marks what the tokenizer added, not special tokens that the text itself spells out.
    own = [i for i, added in enumerate(encoding["special_tokens_mask"]) if not added]
    begin, end = (own[0], own[-1] + 1) if own else (0, 0)
    added_front = encoding["input_ids"][:begin]
    ids = encoding["input_ids"][begin:end]
    # Ends only: an offset whose spaces were trimmed may be empty, but it ends where its token does.
    ends = [stop for _, stop in encoding["offset_mapping"][begin:end]]
    response_begin = len(text) - len(response)
    num_prompt = next((i for i, stop in enumerate(ends) if stop > response_begin), len(ids))
    if not ids or ids[0] not in added_front:
        ids = added_front + ids
        num_prompt += len(added_front)
    return ids[:max_length], num_prompt, len(ids) > max_length


def tokens_digest(tokenized: Iterable[TokenizedExample]) -> str:
    """sha256 over every example's tokens and span: two runs with one digest measure the same text."""
    digest = hashlib.sha256()
    for item in tokenized:
        digest.update(f"{item.example.index} {item.num_prompt_tokens} {item.reason} ".encode())
        digest.update(item.token_ids.astype("<i4").tobytes())
    return digest.hexdigest()
