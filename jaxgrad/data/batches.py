"""Tokenized examples -> padded batches with few shapes.

XLA compiles once per shape, so lengths are rounded up to a grid. Padding changes no number: pad tokens are
on the right, where no real token attends to them, and padded targets and rows have weight 0.

Dimensions: B examples, T tokens, S response positions (targets) of one example.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.data.tokens import TokenizedExample
from jaxgrad.errors import UserError

_MIN_LENGTH = 32
_STEPS_PER_OCTAVE = 8
_MIN_RESPONSES = 16
# Shapes per data file. XLA takes seconds to compile each, so rare lengths are padded to another shape.
MAX_SHAPES = 12


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
    """The examples of one batch.

    Attributes:
        shape: The padded sizes.
        members: Indices in the list given to `plan_batches`, 1 to B of them; further rows are empty.
    """

    shape: BatchShape
    members: tuple[int, ...]


class ExampleArrays(NamedTuple):
    """One example as the model takes it, or a batch with a leading axis B.

    The logits at `positions_S[s]` predict `labels_S[s]`. All are 0 where padded.

    Attributes:
        tokens_T: int32 [T], padded on the right.
        positions_S: int32 [S], positions in T.
        labels_S: int32 [S], the token at the next position.
        weights_S: float64 [S], 1 / (response tokens of the example). In float32, 1/n would cost a float64
            run an error of 6e-8.
    """

    tokens_T: Any
    positions_S: Any
    labels_S: Any
    weights_S: Any


def example_arrays(tokens: Any, positions: Any, labels: Any, weights: Any) -> ExampleArrays:
    """`ExampleArrays` in NumPy, with the right dtypes, from anything array-like."""
    return ExampleArrays(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(labels, np.int32),
        np.asarray(weights, np.float64),
    )


def bucket_length(length: int, max_length: int) -> int:
    """Rounds a token count up to the grid 32, 36, 40, ... 64, 72, 80, ... 128, 144, ...

    Eight steps per octave: from 32 tokens on, padding is less than a ninth of a row. `max_length` is the
    grid's last point.

    Raises:
        ValueError: 1 <= length <= max_length does not hold.
    """
    if not 1 <= length <= max_length:
        raise ValueError(f"length {length} is not in 1..{max_length}")
    octave = _MIN_LENGTH
    while 2 * octave <= length:
        octave *= 2
    step = octave // _STEPS_PER_OCTAVE
    return min(max(octave, -(-length // step) * step), max_length)


def bucket_responses(n: int, num_tokens: int) -> int:
    """Rounds a number of targets up to 16, or beyond that to `num_tokens`.

    More steps would mean more shapes to compile and save nothing: the loss skips padding of long responses
    (`gradients.loss`).

    Raises:
        ValueError: 1 <= n <= num_tokens does not hold.
    """
    if not 1 <= n <= num_tokens:
        raise ValueError(f"{n} response positions are not in 1..{num_tokens}")
    return min(_MIN_RESPONSES, num_tokens) if n <= _MIN_RESPONSES else num_tokens


class RowShape(NamedTuple):
    """The padded sizes of one row of a batch."""

    num_tokens: int
    num_responses: int

    @classmethod
    def of(cls, item: TokenizedExample, max_length: int) -> "RowShape":
        """The grid's shape for an example."""
        num_tokens = bucket_length(item.num_tokens, max_length)
        return cls(num_tokens, bucket_responses(item.num_response_tokens, num_tokens))

    def holds(self, other: "RowShape") -> bool:
        """Whether a row of the other shape fits."""
        return self.num_tokens >= other.num_tokens and self.num_responses >= other.num_responses


def choose_row_shapes(
    tokenized: Sequence[TokenizedExample], *, max_length: int, limit: int = MAX_SHAPES
) -> list[RowShape]:
    """The row shapes of a data file: at most `limit` points of the grid.

    While there are too many, one is merged into the next larger shape that holds it: the one that this
    costs the fewest padded tokens.

    Args:
        tokenized: All examples of the file; those that cannot be measured are ignored.
        max_length: The protocol's.
        limit: At least 1.

    Returns:
        The shapes, descending. Every measurable example fits the first.
    """
    rows = Counter(RowShape.of(item, max_length) for item in tokenized if item.measurable)
    if not rows:
        return []
    # One shape must hold all. In a file of short and long responses, none of the others may.
    rows[RowShape(*(max(sizes) for sizes in zip(*rows, strict=True)))] += 0
    while len(rows) > limit:
        moves = []
        for shape, count in rows.items():
            larger = [other for other in rows if other != shape and other.holds(shape)]
            if larger:
                target = min(larger)
                moves.append((count * (sum(target) - sum(shape)), shape, target))
        _, shape, target = min(moves)
        rows[target] += rows.pop(shape)
    return sorted((shape for shape, count in rows.items() if count), reverse=True)


def plan_batches(
    tokenized: Sequence[TokenizedExample],
    *,
    batch_tokens: int,
    max_length: int,
    row_shapes: Sequence[RowShape] | None = None,
) -> list[Batch]:
    """Sorts the measurable examples into batches.

    Examples are taken from the longest row shape to the shortest. Rows that one shape leaves free in a
    batch are filled from the next shape, so only the last batch has empty rows. Short responses (see
    `bucket_responses`) and long ones are not mixed. All batches of one T have the same number of rows,
    B = max(1, batch_tokens // T), because another B would be another shape. The plan depends only on
    the arguments.

    Args:
        tokenized: The examples; those that cannot be measured are left out.
        batch_tokens: Tokens of a batch, padding included. One row may exceed it.
        max_length: The protocol's.
        row_shapes: From `choose_row_shapes`, for these examples or more; None for these.

    Returns:
        The batches, largest T first, then largest S, so that too little memory shows at once.

    Raises:
        UserError: batch_tokens < 1.
        ValueError: An example is longer than max_length or fits no row shape.
    """
    if batch_tokens < 1:
        raise UserError(f"--batch_tokens={batch_tokens} holds no example; give 1 or more")
    if row_shapes is None:
        row_shapes = choose_row_shapes(tokenized, max_length=max_length)
    queues: dict[bool, list[tuple[RowShape, int]]] = {}
    for position, item in enumerate(tokenized):
        if item.measurable:
            own = RowShape.of(item, max_length)
            row = min(shape for shape in row_shapes if shape.holds(own))
            queues.setdefault(row.num_responses <= _MIN_RESPONSES, []).append((row, position))
    batches = []
    for queue in queues.values():
        queue.sort(key=lambda entry: (-entry[0].num_tokens, entry[1]))
        while queue:
            row = queue[0][0]
            num_examples = max(1, batch_tokens // row.num_tokens)
            members = tuple(sorted(position for _, position in queue[:num_examples]))
            del queue[:num_examples]
            batches.append(Batch(BatchShape(num_examples, *row), members))
    return sorted(batches, key=lambda b: (-b.shape.num_tokens, -b.shape.num_responses, b.members))


def count_shapes(batches: Iterable[Batch]) -> dict[BatchShape, int]:
    """Number of batches of each shape, in the order of the plan. One compilation per key."""
    return dict(Counter(batch.shape for batch in batches))


def batch_arrays(batch: Batch, tokenized: Sequence[TokenizedExample]) -> ExampleArrays:
    """Fills the arrays of a batch.

    Args:
        batch: One batch of the plan.
        tokenized: The list that was planned.
    """
    B, T, S = batch.shape.num_examples, batch.shape.num_tokens, batch.shape.num_responses
    tokens_BT = np.zeros((B, T), np.int32)
    positions_BS = np.zeros((B, S), np.int32)
    labels_BS = np.zeros((B, S), np.int32)
    weights_BS = np.zeros((B, S), np.float64)
    for row, member in enumerate(batch.members):
        item = tokenized[member]
        n = item.num_response_tokens
        tokens_BT[row, : item.num_tokens] = item.token_ids
        positions_BS[row, :n] = item.targets - 1
        labels_BS[row, :n] = item.token_ids[item.targets]
        weights_BS[row, :n] = 1 / n
    return ExampleArrays(tokens_BT, positions_BS, labels_BS, weights_BS)
