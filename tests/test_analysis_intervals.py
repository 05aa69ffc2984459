"""Bootstrap intervals: against scipy's, against a loop, their edge cases, and their coverage."""

import numpy as np
import pytest
import scipy.stats

from jaxgrad.analysis import Resampling, bootstrap, curves, intervals, resampling
from jaxgrad.analysis.intervals import MeanDraws, interval_from_draws
from jaxgrad.analysis.resampling import resample_weights, strata_of
from jaxgrad.errors import UserError

L, P = 5, 2


def log_normal(rng, num_examples, curve_LP, noise=0.3, scale=0.4):
    """Examples with mean curve_LP: one factor an example, one a layer."""
    shape = (num_examples, *np.shape(curve_LP))
    common = np.exp(scale * rng.normal(size=(num_examples, 1, 1)) - scale**2 / 2)
    return common * np.exp(noise * rng.normal(size=shape) - noise**2 / 2) * curve_LP


def identity(mean):
    return mean


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_limits_are_scipys_of_the_same_draws(method):
    rng = np.random.default_rng(0)
    sample = rng.lognormal(size=31)
    theirs = scipy.stats.bootstrap(
        (sample,), np.mean, n_resamples=999, method=method, rng=rng, confidence_level=0.9
    )
    left_out = np.array([np.delete(sample, i).mean() for i in range(31)])
    d = left_out.mean() - left_out
    acceleration = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    ours = interval_from_draws(
        theirs.bootstrap_distribution, sample.mean(), method, 0.9, acceleration
    )
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, rtol=1e-12)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca"])
def test_one_set_agrees_with_scipys_own_resampling(method):
    rng = np.random.default_rng(1)
    sample = rng.lognormal(size=(40, L, P))

    def one_by_one(p):
        def statistic(*layers, axis):
            means = np.stack([layer.mean(axis=axis) for layer in layers])
            return np.abs(np.diff(means, axis=0)).mean(axis=0)

        theirs = scipy.stats.bootstrap(
            tuple(sample[:, :, p].T), statistic, paired=True, n_resamples=20000, method=method,
            rng=np.random.default_rng(2),
        )  # fmt: skip
        return theirs.confidence_interval

    ours = bootstrap(curves.mad, sample, method=method, resampling=Resampling(num_resamples=20000))
    for p in range(P):
        theirs = one_by_one(p)
        width = theirs.high - theirs.low
        # The quantiles of 20000 draws have a standard error of about 1 % of the width.
        assert abs(ours.low[p] - theirs.low) < 0.05 * width
        assert abs(ours.high[p] - theirs.high) < 0.05 * width


@pytest.mark.parametrize("paired", [True, False])
def test_two_sets_agree_with_scipy(paired):
    rng = np.random.default_rng(3)
    first = rng.lognormal(size=37)
    second = first * rng.lognormal(sigma=0.2, size=37)

    def rd(a, b, axis):
        return b.mean(axis=axis) / a.mean(axis=axis) - 1

    theirs = scipy.stats.bootstrap(
        (first, second), rd, paired=paired, n_resamples=20000, rng=rng, method="BCa"
    ).confidence_interval
    ours = bootstrap(
        curves.relative_difference, first[:, None, None], second[:, None, None], method="bca",
        pairs=(np.arange(37),) * 2 if paired else None,
        resampling=Resampling(num_resamples=20000),
    )  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(ours.low.item() - theirs.low) < 0.05 * width
    assert abs(ours.high.item() - theirs.high) < 0.05 * width


def test_pairs_in_any_order_and_those_without_partner():
    """Weights against a loop over the draws of the same generator."""
    sizes, pairs = (4, 5), (np.array([2, 0]), np.array([4, 1]))
    (first_RE, second_RE), = resample_weights(sizes, strata_of(sizes, pairs), 50, seed=9)  # fmt: skip
    rng = np.random.default_rng(9)
    for members in ((pairs[0], pairs[1]), ([1, 3], None), (None, [0, 2, 3])):
        size = len(members[0] if members[0] is not None else members[1])
        for r, drawn in enumerate(rng.integers(0, size, (50, size))):
            for weights, places in zip((first_RE[r], second_RE[r]), members, strict=True):
                for at, place in enumerate(places if places is not None else []):
                    assert weights[place] * len(weights) == pytest.approx((drawn == at).sum())
    np.testing.assert_allclose(first_RE.sum(axis=1), 1)
    np.testing.assert_array_equal(first_RE[:, 2] * 4, second_RE[:, 4] * 5)


def test_remembered_weights_are_those_of_their_own_arguments():
    pairs = (np.array([2, 0]), np.array([4, 1]))
    asked = [
        ((4, 5), pairs, 0),
        ((4, 5), pairs, 1),
        ((4, 5), (pairs[0][::-1], pairs[1]), 0),
        ((4, 5), None, 0),
    ]
    asked += [((5, 4), pairs[::-1], 0), ((9,), None, 0), ((4, 5), pairs, 0)]

    def weights(sizes, pairs, seed):
        (block,) = resample_weights(sizes, strata_of(sizes, pairs), 50, seed)
        return block

    alone = []
    for arguments in asked:
        resampling._remembered_block.cache_clear()
        alone.append(weights(*arguments))
    for arguments, want in zip(asked, alone, strict=True):
        for _ in range(2):
            found = weights(*arguments)
            assert len(found) == len(want)
            for one, two in zip(found, want, strict=True):
                np.testing.assert_array_equal(one, two)
                assert not one.flags.writeable
    assert (alone[0][0] != alone[1][0]).any() and (alone[0][0] != alone[3][0]).any()


def test_many_examples_come_in_blocks():
    sizes = (300_000,)
    blocks = list(resample_weights(sizes, strata_of(sizes), 30, seed=0))
    assert len(blocks) == 3 and sum(len(block) for (block,) in blocks) == 30


def test_paired_examples_narrow_a_contrast():
    rng = np.random.default_rng(4)
    first = log_normal(rng, 60, np.ones((L, P)), noise=0.01)
    second = 2 * first * np.exp(0.01 * rng.normal(size=first.shape))
    paired = bootstrap(curves.relative_difference, first, second, pairs=(np.arange(60),) * 2)
    single = bootstrap(curves.relative_difference, first, second)
    assert (paired.high - paired.low < 0.1 * (single.high - single.low)).all()
    np.testing.assert_array_equal(paired.estimate, single.estimate)


def test_the_same_seed_gives_the_same_interval():
    values = log_normal(np.random.default_rng(5), 30, np.ones((L, P)))
    a, b, c = (bootstrap(identity, values, resampling=Resampling(seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.low, b.low)
    assert (a.low != c.low).any()


def test_statistics_that_share_their_draws_have_the_intervals_of_their_own(monkeypatch):
    rng = np.random.default_rng(13)
    sets = log_normal(rng, 30, np.ones((L, P))), log_normal(rng, 24, np.ones((L, P)))
    options = dict(pairs=(np.arange(9),) * 2, resampling=Resampling(level=0.9, seed=3))
    wanted = [
        bootstrap(curves.relative_difference, *sets, **options),
        bootstrap(curves.mean_absolute_rd, *sets, method="bca", **options),
        MeanDraws(*sets, **options).difference(curves.mad),
    ]
    drawn = []
    draw = intervals.resample_weights
    monkeypatch.setattr(intervals, "resample_weights", lambda *a: drawn.append(a) or draw(*a))
    draws = MeanDraws(*sets, **options)
    found = [
        draws.interval(curves.relative_difference),
        draws.interval(curves.mean_absolute_rd, "bca"),
        draws.difference(curves.mad),
    ]
    assert len(drawn) == 1
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.low, two.low)
        np.testing.assert_array_equal(one.high, two.high)
        assert (one.level, one.method, one.num_resamples) == (0.9, two.method, 2000)


@pytest.mark.parametrize("method", ["percentile", "basic", "bca", "debiased"])
def test_examples_that_are_all_alike_have_a_width_of_zero(method):
    interval = bootstrap(curves.mad, np.ones((30, L, P)) * np.arange(L)[:, None], method=method)
    for limit in (interval.estimate, interval.low, interval.high):
        np.testing.assert_allclose(limit, 1.0)


def test_few_examples():
    for method in ("percentile", "bca", "debiased"):
        one = bootstrap(identity, np.ones((1, L, P)), method=method)
        assert np.isnan(one.low).all() and np.isnan(one.high).all()
        assert one.note == "no interval: a set has fewer than 2 examples"
        np.testing.assert_array_equal(one.estimate, 1.0)
    few = bootstrap(identity, np.arange(2.0)[:, None, None])
    assert few.low == 0 and few.high == 1 and "only 2 examples" in few.note
    assert bootstrap(identity, np.ones((20, L, P))).note is None


@pytest.mark.parametrize(
    ("pairs", "size", "allowed"), [(1, 2, False), (1, 21, True), (18, 19, False)]
)
def test_a_single_unit_of_its_kind(pairs, size, allowed):
    rng = np.random.default_rng(6)
    first, second = rng.lognormal(size=(2, size, L, P))
    interval = bootstrap(
        curves.mean_absolute_rd, first, second, pairs=(np.arange(pairs),) * 2, method="debiased"
    )
    assert np.isfinite(interval.low).all() == allowed
    assert allowed or "cannot be resampled" in interval.note


def test_bca_without_a_draw_beyond_the_estimate_is_no_interval():
    # MAD of noise around a flat curve: nearly every resample is rougher than the sample.
    draws = np.linspace(1.0, 2.0, 200)
    interval = interval_from_draws(draws, np.array(0.5), "bca")
    assert np.isnan(interval.low) and "no BCa interval" in interval.note


def test_the_debiased_interval_by_hand():
    draws = np.linspace(1.1, 1.5, 401)  # bias 0.3 - 1/1000 k: mean 1.3, a tail of 2.5 % is 0.01
    estimate, bias, low, high = 1.25, 0.05, 1.11, 1.49
    interval = interval_from_draws(draws, np.array(estimate), "debiased")
    assert interval.bias == pytest.approx(bias) and interval.note is None
    assert interval.low == pytest.approx(min(2 * estimate - high, low - 2 * bias))
    assert interval.high == pytest.approx(max(2 * estimate - low, high - 2 * bias))
    noisy = interval_from_draws(draws, np.array(1.0), "debiased")  # bias 0.3 > 1/5
    reach = min(2 - high, low - 2 * 0.3) - 2**0.5 * 0.3
    assert noisy.low == pytest.approx(reach) and noisy.note.startswith("mostly noise")
    assert interval_from_draws(draws, np.array(0.6), "debiased").low == 0


def test_what_cannot_be_asked():
    values = np.ones((3, L, P))
    for level in (0, 1, 95, float("nan")):
        with pytest.raises(UserError, match=f"level is {level}: give a coverage"):
            Resampling(level=level)
    for name in ("num_resamples", "num_permutations"):
        with pytest.raises(UserError, match=f"{name} is 10: give 100 or more"):
            Resampling(**{name: 10})
    with pytest.raises(UserError, match="seed is -1"):
        Resampling(seed=-1)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap(identity, values * np.nan)
    with pytest.raises(ValueError, match="empty"):
        bootstrap(identity, values[:0])


# Random curves of 18 layers with steps of 0.5 on a level of 10, where a layer's mean of 100 examples
# has a standard error of 0.5: MAD is biased upward by a fifth there. Percentile fails (the last test),
# BCa too; the docstring of `intervals` has the figures for other sizes.
NUM_STUDIES, NUM_EXAMPLES = 500, 100


def coverage(statistic, sets, method, *, paired=False, layers=18, step=0.5, seed=0):
    """Share of the true values inside 95 % intervals, over NUM_STUDIES simulated data sets."""
    rng = np.random.default_rng(seed)
    pairs = (np.arange(NUM_EXAMPLES),) * 2 if paired else None
    hits = []
    for study in range(NUM_STUDIES):
        truth = [10 + step * np.cumsum(rng.normal(size=(layers, P)), axis=0)]
        truth.append(truth[0] * (1 + 0.2 * rng.normal(size=(layers, P))))
        values = [log_normal(rng, NUM_EXAMPLES, curve) for curve in truth]
        if paired:  # what an instruction does to one response it does to the other
            common = np.exp(0.3 * rng.normal(size=(NUM_EXAMPLES, 1, 1)) - 0.3**2 / 2)
            values = [common * value for value in values]
        interval = bootstrap(
            statistic,
            *values[:sets],
            pairs=pairs,
            method=method,
            resampling=Resampling(num_resamples=500, seed=study),
        )
        target = statistic(*truth[:sets])
        hits.append(((interval.low <= target) & (target <= interval.high)).mean())
    return float(np.mean(hits))


@pytest.mark.parametrize(
    ("statistic", "sets", "method", "paired"),
    [
        (identity, 1, "percentile", False),
        (identity, 1, "bca", False),
        (curves.mad, 1, "debiased", False),
        (curves.segment_mad, 1, "debiased", False),
        (curves.relative_difference, 2, "percentile", True),
        (curves.mean_absolute_rd, 2, "debiased", True),
    ],
)
def test_coverage(statistic, sets, method, paired):
    share = coverage(statistic, sets, method, paired=paired)
    print(f"coverage: {statistic.__name__} {method} {100 * share:.1f} %")
    assert 0.92 <= share <= 0.98


@pytest.mark.parametrize(("step", "noise"), [(0.1, 0.8), (0.5, 0.3), (0.5, 0.8), (2.0, 0.3)])
def test_coverage_of_a_difference_of_mad(step, noise):
    """The second set has more noise, so that its MAD is larger by more than the truth."""
    rng = np.random.default_rng(1)
    hits = []
    for study in range(NUM_STUDIES):
        truth = 10 + step * np.cumsum(rng.normal(size=(18, P)), axis=0)
        truths = truth, truth * (1 + 0.02 * step * rng.normal(size=truth.shape))
        values = [
            log_normal(rng, NUM_EXAMPLES, curve, noise=n)
            for curve, n in zip(truths, (0.3, noise), strict=True)
        ]
        draws = MeanDraws(*values, resampling=Resampling(num_resamples=500, seed=study))
        interval = draws.difference(curves.mad)
        target = curves.mad(truths[1]) - curves.mad(truths[0])
        hits.append(((interval.low <= target) & (target <= interval.high)).mean())
    print(f"coverage: MAD difference, step {step}, noise {noise} {100 * np.mean(hits):.1f} %")
    assert 0.92 <= np.mean(hits) <= 0.98


def test_a_difference_by_hand():
    rng = np.random.default_rng(2)
    first, second = rng.lognormal(size=(2, 30, L, P)) * 0.01 + np.arange(L)[:, None]
    pairs = (np.arange(30), np.arange(30)[::-1])
    result = MeanDraws(first, second, pairs=pairs).difference(curves.mad)
    plain = bootstrap(
        lambda a, b: curves.mad(b) - curves.mad(a), first, second, pairs=pairs, method="basic"
    )
    np.testing.assert_allclose(result.estimate, plain.estimate)
    np.testing.assert_allclose(result.bias, plain.bias, atol=1e-15)
    assert (result.low <= plain.low).all() and (result.high >= plain.high).all()
    # Steps of 1 with an error of 0.003: no bias, and the hull is hardly wider than basic.
    assert (result.high - result.low < 1.2 * (plain.high - plain.low)).all()
    assert result.note is None
    flat = MeanDraws(*(3 + rng.normal(size=(2, 30, 41, P)))).difference(curves.mad)
    assert flat.note.startswith("mostly noise")
    single = MeanDraws(first[:1], second).difference(curves.mad)
    assert np.isnan(single.low).all() and "fewer than 2" in single.note


def test_percentile_and_bca_of_mad_miss_the_truth():
    """The reason for "debiased"; should this fail one day, the plain method would do."""
    assert coverage(curves.mad, 1, "percentile") < 0.6
    assert coverage(curves.mad, 1, "bca") < 0.85
