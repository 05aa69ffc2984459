"""Bootstrap intervals of functions of mean curves; examples are resampled.

The mean of a resample depends only on how often each example was drawn. So all R mean curves are one
product, weights [R, E] @ values [E, L P]: 2000 resamples of 500 examples x 42 layers x 4 projections take
well under a second.

Sources: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14 (equations
14.9 to 14.15 for BCa); the acceleration over several groups as in scipy.stats.bootstrap.

Which method for what. A mean, a curve and a signed RD: percentile. MAD and the absolute RD: "debiased".
These two are means of absolute values: noise makes them larger, and resampling adds noise once more. Where
a curve's steps are of the size of their standard error, the whole percentile interval lies above the truth;
BCa and basic cover too little as well. Coverage of nominal 95 % intervals, 300 simulated studies each, with
18 layers, log-normal examples, curves that are random walks on a level of 10 with steps of 0.1, 0.5 and 2
(the three numbers), 30 % noise a layer, sets unpaired:

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

Where there is no effect at all (a flat curve, two sets of one distribution; 50 to 300 examples, 18 or 42
layers) "debiased" reaches down to zero for MAD in 92 to 96 % of the studies, for the absolute RD in 90 to
96 %, for MAD by segment in 88 to 93 %. Use the sign flips of `separation` to ask whether there is a
difference.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from jaxgrad.analysis.resampling import (
    Resampling,
    Stratum,
    caution,
    joined,
    refusal,
    resample_weights,
    strata_of,
)

Method = Literal["percentile", "bca", "basic", "debiased"]

# A bias above this fraction of the estimate means that most steps are of the size of their error.
_NOISY_BIAS = 0.2
MOSTLY_NOISE = "mostly noise: the bias exceeds a fifth of an estimate"


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: The statistic of all examples, any shape.
        low, high: Of the same shape; NaN where there is no interval (`note` says why).
        level: Nominal coverage.
        method: How the interval was made.
        num_resamples: R.
        bias: Mean of the draws minus the estimate. It estimates how far the estimate lies above the truth.
            NaN without draws.
        note: What limits it; None if nothing does.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    level: float
    method: str
    num_resamples: int
    note: str | None = None


def without_limits(estimate: np.ndarray, level: float, method: str, note: str) -> Interval:
    """An estimate without an interval; `note` says why."""
    nothing = np.full(np.shape(estimate), np.nan)
    return Interval(estimate, nothing, nothing, nothing, level, method, 0, note)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *values: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    method: Method = "percentile",
    resampling: Resampling = Resampling(),
) -> Interval:
    """The interval of a statistic of the mean over examples of one set or of two.

    Args:
        statistic: See `MeanDraws.interval`.
        values: See `MeanDraws`.
        pairs: See `strata_of`.
        method: See `interval_from_draws`.
        resampling: See there.

    Returns:
        An interval of the statistic's shape; see `refusal` for when it has no limits.

    Raises:
        ValueError: A set is empty, or a value is not finite.
    """
    return MeanDraws(*values, pairs=pairs, resampling=resampling).interval(statistic, method)


class MeanDraws:
    """The means over examples of one set or of two, and of their resamples.

    The draws are made once, and all statistics of the same sets share them. `bootstrap` with the same
    arguments has the same draws and intervals.
    """

    def __init__(
        self,
        *values: np.ndarray,
        pairs: tuple[np.ndarray, np.ndarray] | None = None,
        resampling: Resampling = Resampling(),
    ):
        """Makes the draws.

        Args:
            values: For each set [E, ...], finite.
            pairs: See `strata_of`.
            resampling: See there.

        Raises:
            ValueError: A set is empty, or a value is not finite.
        """
        sizes = [len(value) for value in values]
        if min(sizes) == 0 or not all(np.isfinite(value).all() for value in values):
            raise ValueError("bootstrap: a set is empty, or a value is not finite")
        self._values = values
        self._strata = strata_of(sizes, pairs)
        self._resampling = resampling
        self._refusal = refusal(sizes, self._strata)
        self._caution = caution(sizes)
        self._means = [value.mean(axis=0) for value in values]
        self._means_R: list[np.ndarray] = []
        if self._refusal is None:
            self._means_R = _resampled_means(values, self._strata, resampling)

    def interval(
        self, statistic: Callable[..., np.ndarray], method: Method = "percentile"
    ) -> Interval:
        """The interval of a statistic of the means.

        Args:
            statistic: Takes each set's means, with an axis of resamples before theirs ([R, L, P]
                for curves), and returns [R, ...].
            method: See `interval_from_draws`.

        Returns:
            An interval of the statistic's shape; see `refusal` for when it has no limits.
        """
        level = self._resampling.level
        estimate = statistic(*(mean[None] for mean in self._means))[0]
        if self._refusal is not None:
            return without_limits(estimate, level, method, self._refusal)
        acceleration = None
        if method == "bca":
            left_out = _leave_one_out(self._values, self._means, self._strata)
            acceleration = _acceleration([statistic(*left) for left in left_out])
        draws_R = statistic(*self._means_R)
        return interval_from_draws(draws_R, estimate, method, level, acceleration, self._caution)

    def difference(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """The second set's value minus the first's, for a mean of absolute values such as MAD.

        As "debiased", but the bias of each set widens the interval on its own side: where the first set is
        mostly noise, the upper limit reaches further; where the second is, the lower one. Otherwise a
        noisier second set would have a larger MAD by its noise alone: a basic interval covered as little as
        79 % of true differences (300 examples, 80 % noise a layer against 30 %), this one 93 to 98 %.

        Args:
            statistic: Takes mean curves [R, L, P], returns [R, ...].
        """
        level = self._resampling.level
        one, two = (statistic(mean[None])[0] for mean in self._means)
        if self._refusal is not None:
            return without_limits(two - one, level, "debiased", self._refusal)
        one_R, two_R = (statistic(mean_R) for mean_R in self._means_R)
        difference_R = two_R - one_R
        bias = difference_R.mean(axis=0) - (two - one)
        low, high = _hull(np.sort(difference_R, axis=0), two - one, bias, (1 - level) / 2)
        beyond_one, beyond_two = (
            _unseen_bias(draws_R.mean(axis=0) - value, value)
            for draws_R, value in ((one_R, one), (two_R, two))
        )
        note = self._caution
        if (beyond_one > 0).any() or (beyond_two > 0).any():
            note = joined(note, MOSTLY_NOISE)
        return Interval(
            two - one,
            low - beyond_two,
            high + beyond_one,
            bias,
            level,
            "debiased",
            len(one_R),
            note,
        )


def _resampled_means(
    values: Sequence[np.ndarray], strata: Sequence[Stratum], resampling: Resampling
) -> list[np.ndarray]:
    """Each set's means over every resample, [R, ...]."""
    flat = [value.reshape(len(value), -1) for value in values]
    sizes = [len(value) for value in values]
    draws = resample_weights(sizes, strata, resampling.num_resamples, resampling.seed)
    blocks = [[w @ f for w, f in zip(weights, flat, strict=True)] for weights in draws]
    return [
        np.concatenate(of_set).reshape(-1, *value.shape[1:])
        for of_set, value in zip(zip(*blocks, strict=True), values, strict=True)
    ]


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

    "debiased" is for means of absolute values. Basic and q - 2 bias subtract the same bias; they differ in
    which tail of the draws becomes which tail of the interval, and each alone covers too little.
    Where most steps are noise, the bootstrap underestimates the bias. The mean absolute value of n(0, e) is
    e sqrt(2/pi), and all of it is bias; that of the draws, n(0, e sqrt(2)), is sqrt(2) times as large. So
    the bootstrap sees a bias that is sqrt(2) - 1 of the true one: the true one is 1 + sqrt(2) times what it
    sees. Where the bias seen exceeds a fifth of the estimate, the lower limit is therefore lowered by
    another sqrt(2) times the bias seen, and a note says so. The estimate stays as it is defined: it may lie
    above its interval, and then most of it is noise.

    BCa needs draws on both sides of the estimate. Without them z0 is infinite and there is no interval,
    unless every draw equals the estimate: then both limits equal it.

    Args:
        draws_R: [R, ...].
        estimate: [...].
        method: As above.
        level: Nominal coverage.
        acceleration: [...], for BCa; 0 when None.
        note: Goes into the interval.
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
    """The part of the bias that the bootstrap misses where an estimate is mostly noise; else 0."""
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
