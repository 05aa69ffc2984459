"""Bootstrap intervals of anything that is read off mean curves; examples are what is resampled.

A resample of E examples enters a mean only through how often each example was drawn, so that all
R mean curves are one product, weights [R, E] @ values [E, L P]: 2000 resamples of 500 examples x 42
layers x 4 projections in well under a second.

Sources: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14 (equations
14.9 to 14.15 for BCa); the acceleration over several groups as in scipy.stats.bootstrap.

Which method for what. A mean, a curve and a signed RD: percentile. MAD and the absolute RD: neither
percentile nor BCa nor basic, but "debiased". They are means of absolute values, so that noise makes
them larger, and resampling adds noise once more: where steps of a curve are of the size of their
standard error, the percentile interval lies above the truth as a whole. Coverage of nominal 95 %
intervals, 300 simulated studies each, 18 layers, log-normal examples, curves that are random walks
with steps of 0.1, 0.5 and 2 (the three figures) on a level of 10, 30 % noise a layer, sets unpaired:

| statistic, examples | percentile | BCa | basic | debiased |
|---|---|---|---|---|
| MAD, 50 | 0, 6, 82 | 0, 34, 90 | 76, 94, 92 | 92, 96, 94 |
| MAD, 100 | 0, 21, 88 | 0, 63, 91 | 78, 92, 93 | 94, 94, 95 |
| MAD, 300 | 0, 58, 92 | 0, 84, 93 | 86, 90, 94 | 94, 92, 96 |
| MAD by segment, 50 | 1, 54, 90 | 19, 76, 89 | 91, 90, 90 | 92, 96, 94 |
| MAD by segment, 100 | 4, 70, 92 | 32, 83, 91 | 90, 88, 92 | 92, 94, 94 |
| MAD by segment, 300 | 19, 86, 93 | 53, 88, 92 | 92, 89, 92 | 94, 94, 94 |
| abs RD, 50 | 86, 84, 82 | 86, 83, 85 | 89, 90, 92 | 97, 98, 99 |
| abs RD, 100 | 89, 90, 90 | 88, 88, 91 | 90, 91, 93 | 96, 97, 97 |
| abs RD, 300 | 92, 94, 94 | 91, 93, 94 | 92, 92, 92 | 96, 95, 96 |
| curve, 50 | 94, 93, 93 | 94, 93, 93 | 93, 92, 93 | |
| curve, 100 | 95, 95, 94 | 95, 95, 94 | 95, 95, 94 | |
| curve, 300 | 94, 94, 94 | 94, 94, 94 | 94, 95, 94 | |
| signed RD, 50 | 94, 94, 94 | 93, 93, 93 | 92, 93, 93 | |
| signed RD, 100 | 95, 95, 95 | 94, 95, 95 | 94, 94, 94 | |
| signed RD, 300 | 94, 95, 95 | 94, 95, 95 | 94, 95, 95 | |

Where nothing is there at all (a flat curve, two sets of one law; 50 to 300 examples, 18 or 42 layers)
"debiased" reaches down to zero for MAD in 92 to 96 % of the studies, for the absolute RD in 90 to 96 %,
for MAD by segment in 88 to 93 %: whether there is a difference, the sign flips of `separation` say.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from jaxgrad.analysis.resampling import (
    Stratum,
    caution,
    check_resampling,
    joined,
    refusal,
    resample_weights,
    strata_of,
)

Method = Literal["percentile", "bca", "basic", "debiased"]

# A bias of this fraction of the estimate means that most steps are of the size of their error.
_NOISY_BIAS = 0.2
MOSTLY_NOISE = "mostly noise: the bias exceeds a fifth of an estimate"


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: The statistic of all examples, any shape.
        low, high: Of the same shape; NaN where there is no interval, and then `note` says why.
        level: Nominal coverage.
        method: How the interval was made.
        num_resamples: R.
        bias: How much the draws lie above the estimate on average, which estimates how much the
            estimate lies above the truth; NaN without draws.
        note: What limits it, or None.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    level: float
    method: str
    num_resamples: int
    note: str | None = None


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *values: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    method: Method = "percentile",
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of the mean over examples of one set or of two.

    Args:
        statistic: Takes each set's means, with an axis of resamples before theirs ([R, L, P] for
            curves), and returns [R, ...].
        values: For each set [E, ...], finite.
        pairs: See `strata_of`.
        method: See `interval_from_draws`.
        level: Nominal coverage.
        num_resamples: R.
        seed: The same seed gives the same interval.

    Returns:
        An interval of the statistic's shape; see `refusal` for when it has no limits.

    Raises:
        UserError: A level outside (0, 1), or fewer than 100 resamples.
        ValueError: A set is empty, or a value is not finite.
    """
    check_resampling(level, num_resamples)
    sizes = [len(value) for value in values]
    if min(sizes) == 0 or not all(np.isfinite(value).all() for value in values):
        raise ValueError("bootstrap: a set is empty, or a value is not finite")
    strata = strata_of(sizes, pairs)
    means = [value.mean(axis=0) for value in values]
    estimate = statistic(*(mean[None] for mean in means))[0]
    note = refusal(sizes, strata)
    if note is not None:
        nothing = np.full(np.shape(estimate), np.nan)
        return Interval(estimate, nothing, nothing, nothing, level, method, 0, note)
    draws_R = _draws(statistic, values, strata, num_resamples, seed)
    acceleration = None
    if method == "bca":
        acceleration = _acceleration(
            [statistic(*left) for left in _leave_one_out(values, means, strata)]
        )
    return interval_from_draws(draws_R, estimate, method, level, acceleration, caution(sizes))


def bootstrap_difference(
    statistic: Callable[[np.ndarray], np.ndarray],
    first: np.ndarray,
    second: np.ndarray,
    *,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The second set's mean of absolute values minus the first's, such as a difference of MAD.

    As "debiased", but each set's bias pulls to its own side: where the first set's is mostly noise
    the upper limit reaches further, where the second's is the lower one. Without that a noisier
    second set has a larger MAD by its noise alone, and a basic interval covered as little as 79 %
    of true differences (300 examples, 80 % noise a layer against 30 %); this one 93 to 98 %.

    Args:
        statistic: Takes mean curves [R, L, P], returns [R, ...].
        first: The reference set [E, L, P], finite.
        second: The other.
        pairs: See `strata_of`.
        level: Nominal coverage.
        num_resamples: R.
        seed: The same seed gives the same interval.

    Raises:
        UserError: As `bootstrap`.
    """

    def both(first_R: np.ndarray, second_R: np.ndarray) -> np.ndarray:
        return np.stack([statistic(first_R), statistic(second_R)], axis=1)

    check_resampling(level, num_resamples)
    sizes = (len(first), len(second))
    strata = strata_of(sizes, pairs)
    one, two = both(first.mean(axis=0)[None], second.mean(axis=0)[None])[0]
    note = refusal(sizes, strata)
    if note is not None:
        nothing = np.full(np.shape(one), np.nan)
        return Interval(two - one, nothing, nothing, nothing, level, "debiased", 0, note)
    draws_R = _draws(both, (first, second), strata, num_resamples, seed)
    difference_R = draws_R[:, 1] - draws_R[:, 0]
    bias = difference_R.mean(axis=0) - (two - one)
    low, high = _hull(np.sort(difference_R, axis=0), two - one, bias, (1 - level) / 2)
    beyond_one, beyond_two = (
        _unseen_bias(draws_R[:, k].mean(axis=0) - value, value)
        for k, value in enumerate((one, two))
    )
    note = caution(sizes)
    if (beyond_one > 0).any() or (beyond_two > 0).any():
        note = joined(note, MOSTLY_NOISE)
    return Interval(
        two - one, low - beyond_two, high + beyond_one, bias, level, "debiased", num_resamples, note
    )


def _draws(
    statistic: Callable[..., np.ndarray],
    values: Sequence[np.ndarray],
    strata: Sequence[Stratum],
    num_resamples: int,
    seed: int,
) -> np.ndarray:
    """The statistic of every resample, [R, ...]."""
    flat = [value.reshape(len(value), -1) for value in values]
    sizes = [len(value) for value in values]
    blocks = []
    for weights in resample_weights(sizes, strata, num_resamples, seed):
        means = [
            (w @ f).reshape(len(w), *value.shape[1:])
            for w, f, value in zip(weights, flat, values, strict=True)
        ]
        blocks.append(statistic(*means))
    return np.concatenate(blocks)


def interval_from_draws(
    draws_R: np.ndarray,
    estimate: np.ndarray,
    method: Method,
    level: float = 0.95,
    acceleration: np.ndarray | None = None,
    note: str | None = None,
) -> Interval:
    """Limits from a bootstrap distribution.

    With q the quantiles of the draws and a = (1 - level) / 2:

    | method | limits |
    |---|---|
    | percentile | q(a), q(1 - a) |
    | basic | 2 estimate - q(1 - a), 2 estimate - q(a): the bias of the draws is taken off twice |
    | bca | q at levels shifted by the median bias z0 and the acceleration |
    | debiased | the hull of the basic limits and of q - 2 bias, not below zero; see there |

    "debiased" is for means of absolute values. Basic and q - 2 bias take the same bias off and differ
    in which tail of the draws becomes which tail of the interval; either alone covers too little.
    The bias itself is underestimated where most steps are noise: of n(0, e) the mean absolute value
    is e sqrt(2/pi), all of it bias, of the draws n(0, e sqrt(2)) it is sqrt(2) times that, so that the
    bootstrap sees sqrt(2) - 1 of the bias and the estimate holds 1 + sqrt(2) times what is seen. Where
    the bias seen exceeds a fifth of the estimate, the lower limit therefore reaches down by another
    sqrt(2) times it, and a note says so. The estimate itself is left as it is by definition: it may
    lie above its interval, and then most of it is noise.

    BCa needs draws on both sides of the estimate. Where there are none (z0 is infinite) there is no
    interval, unless every draw equals the estimate: then both limits do.

    Args:
        draws_R: [R, ...].
        estimate: [...].
        method: As above.
        level: Nominal coverage.
        acceleration: [...], for BCa; 0 when None.
        note: Handed on.
    """
    estimate = np.asarray(estimate)
    tail = (1 - level) / 2
    ordered_R = np.sort(draws_R, axis=0)
    bias = draws_R.mean(axis=0) - estimate
    if method == "bca":
        below = ((draws_R < estimate).mean(axis=0) + (draws_R <= estimate).mean(axis=0)) / 2
        shift = ndtri(below)
        skew = np.zeros_like(estimate) if acceleration is None else acceleration
        with np.errstate(invalid="ignore"):
            low, high = (
                _quantile(ordered_R, ndtr(shift + (shift + z) / (1 - skew * (shift + z))))
                for z in (ndtri(tail), ndtri(1 - tail))
            )
        if np.isinf(shift).any():
            note = joined(note, "no BCa interval: no draw beyond the estimate")
    else:
        low, high = (_quantile(ordered_R, np.full(estimate.shape, at)) for at in (tail, 1 - tail))
        if method == "basic":
            low, high = 2 * estimate - high, 2 * estimate - low
        elif method == "debiased":
            low, high = _hull(ordered_R, estimate, bias, tail)
            beyond = _unseen_bias(bias, estimate)
            low = np.maximum(low - beyond, 0.0)
            if (beyond > 0).any():
                note = joined(note, MOSTLY_NOISE)
    return Interval(estimate, low, high, bias, level, method, len(draws_R), note)


def _hull(
    ordered_R: np.ndarray, estimate: np.ndarray, bias: np.ndarray, tail: float
) -> tuple[np.ndarray, np.ndarray]:
    """The wider of the basic limits and of the percentile limits moved by twice the bias."""
    low, high = (_quantile(ordered_R, np.full(estimate.shape, at)) for at in (tail, 1 - tail))
    return (
        np.minimum(2 * estimate - high, low - 2 * bias),
        np.maximum(2 * estimate - low, high - 2 * bias),
    )


def _unseen_bias(bias: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """The bias that the bootstrap does not see where an estimate is mostly noise; else 0."""
    return np.where(bias > _NOISY_BIAS * estimate, math.sqrt(2) * bias, 0.0)


def _quantile(ordered_R: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Quantile `at` of each component, linear between order statistics; NaN where either is NaN."""
    undefined = np.isnan(at) | np.isnan(ordered_R).any(axis=0)
    place = np.where(undefined, 0.0, at) * (len(ordered_R) - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, len(ordered_R) - 1)
    lower, upper = (np.take_along_axis(ordered_R, i[None], axis=0)[0] for i in (below, above))
    return np.where(undefined, np.nan, lower + (place - below) * (upper - lower))


def _leave_one_out(
    values: Sequence[np.ndarray], means: Sequence[np.ndarray], strata: Sequence[Stratum]
) -> Iterator[list[np.ndarray]]:
    """For each stratum, each set's means without unit 1, 2, ...: [units, ...]."""
    for stratum in strata:
        without = []
        for value, mean, places in zip(values, means, stratum.members, strict=True):
            if places is None:
                without.append(np.broadcast_to(mean, (stratum.size, *mean.shape)))
            else:
                without.append((len(value) * mean - value[places]) / (len(value) - 1))
        yield without


def _acceleration(jackknife: Sequence[np.ndarray]) -> np.ndarray:
    """BCa's acceleration from the leave-one-out statistics of each stratum, [units, ...] each."""
    cubes, squares = np.float64(0), np.float64(0)
    for left in jackknife:
        n = len(left)
        influence = (n - 1) * (left.mean(axis=0) - left)
        cubes = cubes + (influence**3).sum(axis=0) / n**3
        squares = squares + (influence**2).sum(axis=0) / n**2
    flat = squares == 0
    return np.where(flat, 0.0, cubes / np.where(flat, 1.0, 6 * squares**1.5))
