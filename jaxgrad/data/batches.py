"""Stage 2b: tokenized examples -> padded batches of a bounded number of shapes.

XLA compiles once a shape, so lengths are rounded up to a grid. Padding changes nothing: pad tokens
stand on the right, where no earlier token sees them, and padded targets and rows weigh exactly 0.

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
# Programs that one data file may need. XLA takes seconds for each, so a long tail of rare lengths is
# padded further rather than compiled for.
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
    """Which examples stand in a batch.

    Attributes:
        shape: The padded sizes.
        members: Positions in the list given to the planner, 1 to B of them; rows beyond are empty.
    """

    shape: BatchShape
    members: tuple[int, ...]


class ExampleArrays(NamedTuple):
    """One example as the model takes it; with a leading B, a batch.

    For a target s: the logits at `positions_S[s]` predict `labels_S[s]`.

    Attributes:
        tokens_T: int32 [T], 0 where padded, padding on the right.
        positions_S: int32 [S], positions in T; 0 where padded.
        labels_S: int32 [S], the token at the position after; 0 where padded.
        weights_S: float64 [S], 1 / (response tokens of the example); exactly 0 where padded. (In float32
            1/n alone would cost a float64 run 6e-8.)
    """

    tokens_T: Any
    positions_S: Any
    labels_S: Any
    weights_S: Any


def example_arrays(tokens: Any, positions: Any, labels: Any, weights: Any) -> ExampleArrays:
    """Anything array-like as `ExampleArrays`, in NumPy arrays of the right dtypes."""
    return ExampleArrays(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(labels, np.int32),
        np.asarray(weights, np.float64),
    )


def bucket_length(length: int, max_length: int) -> int:
    """Rounds a token count up to the grid 32, 36, 40, ... 64, 72, 80, ... 128, 144, ...

    Eight steps an octave waste less than a ninth of a row from 32 tokens on. `max_length` caps the
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
    padding (`gradients.loss`).

    Raises:
        ValueError: Not 1 <= n <= num_tokens.
    """
    if not 1 <= n <= num_tokens:
        raise ValueError(f"{n} response positions are not in 1..{num_tokens}")
    return min(_MIN_RESPONSES, num_tokens) if n <= _MIN_RESPONSES else num_tokens


class RowShape(NamedTuple):
    """The padded sizes of one row of a batch; the number of rows follows from `num_tokens`."""

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
    """The row shapes of a data file: at most `limit`, of the grid.

    While there are too many, the one goes whose examples cost the fewest padded tokens in the next
    larger shape that holds them.

    Args:
        tokenized: All examples of the file; those that cannot be measured do not count.
        max_length: The protocol's.
        limit: At least 1.

    Returns:
        Descending. Every measurable example fits the first.
    """
    rows = Counter(RowShape.of(item, max_length) for item in tokenized if item.measurable)
    if not rows:
        return []
    # One shape has to hold all; without it a file of short and long responses might have none.
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
    """Sorts the measurable examples into batches of one shape each.

    Examples are taken from the longest row shape to the shortest, and a batch is filled to the token
    budget: rows that the longest shape leaves free are filled from the next one, so only the last batch
    has empty rows. Short responses (see `bucket_responses`) and long ones do not mix. Every batch of a
    T holds B = max(1, batch_tokens // T) rows: a smaller B would be one more shape. The plan
    depends on the arguments alone.

    Args:
        tokenized: The examples; those that cannot be measured are left out.
        batch_tokens: Tokens of a batch, padding included. One row may exceed it.
        max_length: The protocol's.
        row_shapes: From `choose_row_shapes`, of these examples or of more; not given: of these.

    Returns:
        The batches, largest T first, then largest S: what exceeds the memory fails at once.

    Raises:
        UserError: batch_tokens < 1.
        ValueError: An example is longer than max_length, or fits no row shape.
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
    """How many batches each shape has, in the order of the plan: one compilation a key."""
    return dict(Counter(batch.shape for batch in batches))


def batch_arrays(batch: Batch, tokenized: Sequence[TokenizedExample]) -> ExampleArrays:
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
    return ExampleArrays(tokens_BT, positions_BS, labels_BS, weights_BS)
