"""How well two sets are told apart, a projection at a time: p of sign flips, and AUC."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from jaxgrad.analysis.intervals import Interval, interval_from_draws, without_limits
from jaxgrad.analysis.resampling import (
    Resampling,
    caution,
    joined,
    refusal,
    resample_weights,
    strata_of,
)

# 2^14 patterns cost about as much as the default number of drawn ones.
_MOST_PAIRS_EXACT = 14
_BLOCK_VALUES = 2**22
# Relative: sums that differ by rounding count as equal.
_TIE = 1e-12


@dataclass(frozen=True)
class SignFlip:
    """A paired permutation test.

    Attributes:
        p_P: Two-sided p of each projection; NaN without a pair.
        num_pairs: Differences that were flipped.
        num_permutations: Sign patterns that were used: 2^pairs when exact.
        exact: All patterns were used; none were drawn.
    """

    p_P: np.ndarray
    num_pairs: int
    num_permutations: int
    exact: bool


def sign_flip_test(difference_EP: np.ndarray, *, resampling: Resampling = Resampling()) -> SignFlip:
    """Two-sided p of the mean of paired differences, under flips of their signs.

    Under the null hypothesis (an instruction's two examples could be swapped) every pattern of signs is
    equally likely. p is the share of patterns whose |mean| reaches the observed one. Up to 14 pairs all
    patterns are used. With more, m patterns are drawn, b of them reach it, and p = (b + 1) / (m + 1), which
    counts the observed pattern too and is never 0 (Phipson & Smyth 2010). All projections share the signs.

    | case | p |
    |---|---|
    | no pair | NaN |
    | n <= 14 pairs of one sign | 2 / 2^n: the smallest there can be |
    | all differences zero | 1 |
    """
    num_permutations = resampling.num_permutations
    n = len(difference_EP)
    if n == 0:
        return SignFlip(np.full(difference_EP.shape[1:], np.nan), 0, 0, True)
    threshold_P = np.abs(difference_EP.sum(axis=0)) - _TIE * np.abs(difference_EP).sum(axis=0)
    if n <= _MOST_PAIRS_EXACT:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        reached_P = _count(1.0 - 2.0 * patterns, difference_EP, threshold_P)
        return SignFlip(reached_P / 2**n, n, 2**n, True)
    rng = np.random.default_rng(resampling.seed)
    reached_P = np.zeros(difference_EP.shape[1:], np.int64)
    block = max(1, _BLOCK_VALUES // n)
    for start in range(0, num_permutations, block):
        rows = min(block, num_permutations - start)
        patterns = rng.integers(0, 2, (rows, n), dtype=np.int8)
        for some in _in_cache(patterns):
            reached_P += _count(1.0 - 2.0 * some, difference_EP, threshold_P)
    return SignFlip((reached_P + 1) / (num_permutations + 1), n, num_permutations, False)


def _in_cache(array_RE: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, 128 at a time, so that intermediate arrays fit into the processor's cache."""
    return (array_RE[at : at + 128] for at in range(0, len(array_RE), 128))


def _count(signs: np.ndarray, difference_EP: np.ndarray, threshold_P: np.ndarray) -> np.ndarray:
    return (np.abs(signs @ difference_EP) >= threshold_P).sum(axis=0)


def chance_smaller(
    first_EP: np.ndarray,
    second_EP: np.ndarray,
    *,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    resampling: Resampling = Resampling(),
) -> Interval:
    """AUC: the chance that a random example of the second set has a smaller value than one of the first.

    Ties count half. At 1/2 the sets cannot be told apart by it; at 1 every example of the second is
    smaller. The interval is the percentile bootstrap's (pairs are drawn as units). At AUC 0 or 1 every
    resample gives the same value, and an interval of width zero would be wrong. The limit is then Clopper &
    Pearson's for min(E1, E2) disjoint comparisons of one outcome: (tail)^(1/min(E1, E2)), or 1 minus it.

    Args:
        first_EP: A value for every example of the reference set and projection.
        second_EP: Of the other set.
        pairs: See `resampling.strata_of`.
        resampling: See there.

    Returns:
        Interval [P]; without limits where `resampling.refusal` says so.
    """
    level = resampling.level
    estimate = np.array(
        [_auc(a, b) for a, b in zip(first_EP.T, second_EP.T, strict=True)], np.float64
    )
    sizes = (len(first_EP), len(second_EP))
    strata = strata_of(sizes, pairs)
    note = refusal(sizes, strata)
    if note is not None:
        return without_limits(estimate, level, "percentile", note)
    blocks = []
    for weights in resample_weights(sizes, strata, resampling.num_resamples, resampling.seed):
        for first_RE, second_RE in zip(*map(_in_cache, weights), strict=True):
            by_projection = [
                _weighted_auc(a, b, first_RE, second_RE)
                for a, b in zip(first_EP.T, second_EP.T, strict=True)
            ]
            blocks.append(np.stack(by_projection, axis=-1))
    interval = interval_from_draws(
        np.concatenate(blocks), estimate, "percentile", level, note=caution(sizes)
    )
    tail = (1 - level) / 2
    bound = tail ** (1 / min(sizes))
    apart = (estimate == 0) | (estimate == 1)
    if not apart.any():
        return interval
    return Interval(
        estimate,
        np.where(estimate == 1, bound, np.where(estimate == 0, 0.0, interval.low)),
        np.where(estimate == 0, 1 - bound, np.where(estimate == 1, 1.0, interval.high)),
        interval.bias,
        level,
        "percentile",
        interval.num_resamples,
        joined(interval.note, "sets wholly apart: the limit is Clopper and Pearson's"),
    )


def _auc(first_E: np.ndarray, second_E: np.ndarray) -> float:
    """Mann & Whitney's U of the first set, as a share of all comparisons."""
    n = len(first_E)
    above = rankdata(np.concatenate([first_E, second_E]))[:n].sum() - n * (n + 1) / 2
    return float(above / (n * len(second_E)))


def _weighted_auc(
    first_E: np.ndarray, second_E: np.ndarray, first_RE: np.ndarray, second_RE: np.ndarray
) -> np.ndarray:
    """AUC under weights, [R]. Cumulative weights of the second set save an array [E1, E2]."""
    order = np.argsort(second_E, kind="stable")
    below_RE = np.zeros((len(second_RE), len(order) + 1))
    np.cumsum(second_RE[:, order], axis=1, out=below_RE[:, 1:])
    left, right = (
        np.searchsorted(second_E[order], first_E, side=side) for side in ("left", "right")
    )
    return np.einsum("re,re->r", first_RE, below_RE[:, left] + below_RE[:, right]) / 2
