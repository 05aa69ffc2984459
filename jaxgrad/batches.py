"""Stage 2b: tokenized examples -> padded batches of a bounded number of shapes.

XLA compiles once a shape, so lengths are rounded up to a grid. Padding changes nothing: pad tokens
stand on the right, where no earlier token sees them, and padded targets and rows weigh exactly 0.

Dimensions: B examples, T tokens, S response positions (targets) of one example.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxgrad.errors import UserError
from jaxgrad.tokens import TokenizedExample

_MIN_LENGTH = 32
_STEPS_PER_OCTAVE = 4
_MIN_RESPONSES = 16


@dataclass(frozen=True, order=True)
class BatchShape:
    """The padded sizes of a batch.

    Attributes:
        num_examples: B.
        num_tokens: T.
        num_responses: S, response positions of one example.
    """

    num_examples: int
    num_tokens: int
    num_responses: int


@dataclass(frozen=True)
class Batch:
    """Which examples stand in a batch.

    Attributes:
        shape: The padded sizes.
        members: Positions in the list given to the planner, 1 to B of them; rows beyond are empty.
    """

    shape: BatchShape
    members: tuple[int, ...]


@dataclass(frozen=True, eq=False)  # eq: arrays have no truth value to compare by
class BatchArrays:
    """A batch as the model takes it.

    For a target s of row b: the logits at `positions_BS[b, s]` predict `labels_BS[b, s]`, and the
    loss of the row is the sum over s of `weights_BS[b, s]` times the negative log likelihood.

    Attributes:
        tokens_BT: int32, 0 where padded, padding on the right.
        positions_BS: int32, positions in T; 0 where padded.
        labels_BS: int32, the token at the position after; 0 where padded.
        weights_BS: float64, 1 / (response tokens of the row); exactly 0 where padded. (In float32
            1/n alone would cost a float64 run 6e-8.)
    """

    tokens_BT: NDArray[np.int32]
    positions_BS: NDArray[np.int32]
    labels_BS: NDArray[np.int32]
    weights_BS: NDArray[np.float64]


def bucket_length(length: int, max_length: int) -> int:
    """Rounds a token count up to the grid 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ...

    Four steps an octave waste less than a fifth of a row from 32 tokens on. `max_length` caps the
    grid and belongs to it.

    Raises:
        ValueError: Not 1 <= length <= max_length.
    """
    if not 1 <= length <= max_length:
        raise ValueError(f"length {length} is not in 1..{max_length}")
    octave = _MIN_LENGTH
    while 2 * octave <= length:
        octave *= 2
    step = octave // _STEPS_PER_OCTAVE
    return min(max(octave, -(-length // step) * step), max_length)


def bucket_responses(n: int, num_tokens: int) -> int:
    """Rounds a number of targets up to 16, or else to `num_tokens`.

    More steps would only be more shapes to compile: of a longer response the loss leaves out what is
    padding (`gradients.chunked_response_loss`).

    Raises:
        ValueError: Not 1 <= n <= num_tokens.
    """
    if not 1 <= n <= num_tokens:
        raise ValueError(f"{n} response positions are not in 1..{num_tokens}")
    return min(_MIN_RESPONSES, num_tokens) if n <= _MIN_RESPONSES else num_tokens


def shape_bound(max_length: int) -> int:
    """How many (T, S) shapes there can be at most, whatever the data; B follows from T."""
    bound = 0
    length = 0
    while length < max_length:
        length = bucket_length(length + 1, max_length)
        # Token 0 is never a target, so a row of T tokens has at most T - 1.
        bound += len({bucket_responses(n, length) for n in range(1, length)})
    return bound


def plan_batches(
    tokenized: Sequence[TokenizedExample], *, batch_tokens: int, max_length: int
) -> list[Batch]:
    """Sorts the measurable examples into batches.

    Examples of one (T, S) bucket share batches, in their original order. Every batch of a T holds
    B = max(1, batch_tokens // T) rows, the last one of a bucket too: a smaller B would be one more
    shape. The plan depends on the arguments alone.

    Args:
        tokenized: All examples; those that cannot be measured are left out.
        batch_tokens: Tokens of a batch, padding included. One row may exceed it.
        max_length: The protocol's.

    Returns:
        The batches, largest T first, then largest S: what exceeds the memory fails at once.

    Raises:
        UserError: batch_tokens < 1.
        ValueError: An example is longer than max_length.
    """
    if batch_tokens < 1:
        raise UserError(f"--batch_tokens={batch_tokens} holds no example; give 1 or more")
    groups: dict[tuple[int, int], list[int]] = {}
    for position, item in enumerate(tokenized):
        if item.measurable:
            num_tokens = bucket_length(item.num_tokens, max_length)
            num_responses = bucket_responses(item.num_response_tokens, num_tokens)
            groups.setdefault((num_tokens, num_responses), []).append(position)
    batches = []
    for (num_tokens, num_responses), members in sorted(groups.items(), reverse=True):
        num_examples = max(1, batch_tokens // num_tokens)
        shape = BatchShape(num_examples, num_tokens, num_responses)
        for begin in range(0, len(members), num_examples):
            batches.append(Batch(shape, tuple(members[begin : begin + num_examples])))
    return batches


def count_shapes(batches: Iterable[Batch]) -> dict[BatchShape, int]:
    """How many batches each shape has, in the order of the plan: one compilation a key."""
    return dict(Counter(batch.shape for batch in batches))


def batch_arrays(batch: Batch, tokenized: Sequence[TokenizedExample]) -> BatchArrays:
    """Fills the arrays of a batch.

    Args:
        batch: One batch of the plan.
        tokenized: The list that the plan was made of.
    """
    B, T, S = batch.shape.num_examples, batch.shape.num_tokens, batch.shape.num_responses
    tokens_BT = np.zeros((B, T), np.int32)
    positions_BS = np.zeros((B, S), np.int32)
    labels_BS = np.zeros((B, S), np.int32)
    weights_BS = np.zeros((B, S), np.float64)
    for row, member in enumerate(batch.members):
        item = tokenized[member]
        prompt, length, n = item.num_prompt_tokens, item.num_tokens, item.num_response_tokens
        tokens_BT[row, :length] = item.token_ids
        positions_BS[row, :n] = np.arange(prompt - 1, length - 1)
        labels_BS[row, :n] = item.token_ids[prompt:]
        weights_BS[row, :n] = 1 / n
    return BatchArrays(tokens_BT, positions_BS, labels_BS, weights_BS)
