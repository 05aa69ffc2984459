"""The bootstrap's draws: which examples are drawn together, how often, and when there is no interval.

Two sets are resampled together. Where an instruction stands in both, its two examples are drawn as one
unit: what makes both hard to learn then cancels in the contrast. A set's examples without partner are drawn
among themselves. The estimate uses all examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jaxgrad.errors import UserError

# Weights held at a time: 32 MB.
_BLOCK_VALUES = 2**22
# With fewer examples percentile and BCa intervals of a mean are too narrow. A note says so.
FEW_EXAMPLES = 20


@dataclass(frozen=True)
class Resampling:
    """How intervals and p are made.

    Attributes:
        level: Nominal coverage of each interval; there is no correction for many intervals.
        num_resamples: Bootstrap resamples.
        num_permutations: Sign patterns that are drawn where there are too many to use all.
        seed: The same seed gives the same numbers.

    Raises:
        UserError: A level outside (0, 1), fewer than 100 resamples or permutations, a negative seed.
    """

    level: float = 0.95
    num_resamples: int = 2000
    num_permutations: int = 9999
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise UserError(f"level is {self.level}: give a coverage between 0 and 1, like 0.95.")
        for name in ("num_resamples", "num_permutations"):
            if getattr(self, name) < 100:
                raise UserError(f"{name} is {getattr(self, name)}: give 100 or more.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more.")


@dataclass(frozen=True)
class Stratum:
    """Units that are drawn among themselves: `members[k]` are their positions in set k, or None.

    A pair is one unit, with a position in both sets.
    """

    members: tuple[np.ndarray | None, ...]

    @property
    def size(self) -> int:
        """How many units."""
        return next(len(places) for places in self.members if places is not None)


def strata_of(
    sizes: Sequence[int], pairs: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[Stratum, ...]:
    """How one set, or two sets with pairs, are resampled.

    Args:
        sizes: Examples of each set.
        pairs: Positions in the first and in the second set of the examples that belong together.

    Returns:
        One stratum of the pairs and one of the other examples of each set, where there are any.
    """
    strata = []
    paired: list[np.ndarray] = [np.empty(0, np.int64) for _ in sizes]
    if pairs is not None and len(pairs[0]):
        if len(sizes) != 2 or len(pairs[0]) != len(pairs[1]):
            raise ValueError("pairs are of two sets, one place in each")
        paired = [np.asarray(places) for places in pairs]
        strata.append(Stratum(tuple(paired)))
    for k, size in enumerate(sizes):
        others = np.setdiff1d(np.arange(size), paired[k])
        if len(others):
            strata.append(Stratum(tuple(others if j == k else None for j in range(len(sizes)))))
    return tuple(strata)


def refusal(sizes: Sequence[int], strata: Sequence[Stratum]) -> str | None:
    """Why these sets allow no interval, or None.

    | case | interval |
    |---|---|
    | a set with fewer than 2 examples | none: how examples vary is unknown |
    | a stratum of one unit, its set has 20 examples or more | yes: that unit is in every resample |
    | the same in a smaller set | none |

    One of n examples in every resample makes the interval narrower by 1/(2n) of its width, 1/40 at most.
    """
    if min(sizes) < 2:
        return "no interval: a set has fewer than 2 examples"
    for stratum in strata:
        for places, size in zip(stratum.members, sizes, strict=True):
            if places is not None and stratum.size == 1 and size < FEW_EXAMPLES:
                return "no interval: a single example with or without partner cannot be resampled"
    return None


def caution(sizes: Sequence[int]) -> str | None:
    """The note for an interval from few examples, or None."""
    if min(sizes) >= FEW_EXAMPLES:
        return None
    return f"only {min(sizes)} examples in a set: the interval tends to be too narrow"


def resample_weights(
    sizes: Sequence[int], strata: Sequence[Stratum], num_resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of bootstrap weights: for each set [block, E], each row sums to 1; read-only.

    The same sizes, strata and seed give the same weights. Where all fit into one block, the latest block
    is kept: all statistics of one comparison ask for the same.
    """
    if num_resamples * sum(sizes) > _BLOCK_VALUES:
        yield from _draw(sizes, strata, num_resamples, seed)
        return
    places = tuple(
        tuple(None if at is None else at.astype(np.int64).tobytes() for at in stratum.members)
        for stratum in strata
    )
    yield _remembered_block(tuple(sizes), places, num_resamples, seed)


@lru_cache(maxsize=1)
def _remembered_block(
    sizes: tuple[int, ...],
    places: tuple[tuple[bytes | None, ...], ...],
    num_resamples: int,
    seed: int,
) -> tuple[np.ndarray, ...]:
    strata = [
        Stratum(tuple(None if at is None else np.frombuffer(at, np.int64) for at in members))
        for members in places
    ]
    (weights,) = _draw(sizes, strata, num_resamples, seed)
    for weights_RE in weights:
        weights_RE.setflags(write=False)
    return weights


def _draw(
    sizes: Sequence[int], strata: Sequence[Stratum], num_resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    block = max(1, min(num_resamples, _BLOCK_VALUES // sum(sizes)))
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        weights = tuple(np.zeros((rows, size)) for size in sizes)
        for stratum in strata:
            drawn = rng.integers(0, stratum.size, (rows, stratum.size))
            drawn += stratum.size * np.arange(rows)[:, None]
            count = np.bincount(drawn.ravel(), minlength=rows * stratum.size)
            for k, places in enumerate(stratum.members):
                if places is not None:
                    weights[k][:, places] = count.reshape(rows, -1) / sizes[k]
        yield weights


def joined(*notes: str | None) -> str | None:
    """Notes as one text, each once; None when there is none."""
    return "; ".join(dict.fromkeys(note for note in notes if note)) or None
