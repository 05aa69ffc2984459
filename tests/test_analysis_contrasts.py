"""Two sets compared: who is paired with whom, p, AUC, what is refused, and the whole contrast."""

import itertools

import numpy as np
import pytest
import scipy.stats
from analysis_runs import example, identity, results, set_of

from jaxgrad.analysis import (
    Resampling,
    chance_smaller,
    check_comparable,
    contrast,
    describe,
    example_set,
    pair_by_instruction,
    sign_flip_test,
)
from jaxgrad.errors import UserError

L, P = 3, 2
FAST = Resampling(num_resamples=200, num_permutations=199)


def random_set(seed, num_examples=23, layers=L, **more):
    return set_of(np.random.default_rng(seed).lognormal(size=(num_examples, layers, P)), **more)


def test_pairs_by_instruction_with_duplicates():
    one = random_set(0, 5, instruction=["a", "b", "a", "c", "a"])
    two = random_set(1, 4, instruction=["a", "d", "a", "b"])
    pairs = pair_by_instruction(one, two)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 0), (1, 3), (2, 2)]
    back = pair_by_instruction(two, one)
    assert sorted(zip(back.second, back.first, strict=True)) == [(0, 0), (1, 3), (2, 2)]


def test_a_skipped_duplicate_does_not_shift_the_others():
    rows = [
        example(i, np.ones((L, 4)), instruction="a", status="skipped" if i == 0 else "ok")
        for i in range(3)
    ]
    one = example_set(results(rows, num_layers=L), "one")
    two = set_of(np.ones((3, L, 4)), instruction=["a"] * 3)
    pairs = pair_by_instruction(one, two)
    # The places in `one` are those of the data file's examples 1 and 2.
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 1), (1, 2)]


def test_no_instruction_in_common():
    two = random_set(1, instruction=[f"other {i}" for i in range(23)])
    result = contrast(random_set(0), two, resampling=FAST)
    assert len(result.pairs) == 0 and np.isnan(result.sign_flip.p_P).all()
    assert np.isfinite(result.difference_P.low).all()


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 14])
def test_exact_p_against_every_pattern_of_signs(num_pairs):
    difference_EP = np.random.default_rng(num_pairs).normal(0.3, 1, size=(num_pairs, P))
    result = sign_flip_test(difference_EP)
    assert result.exact and result.num_permutations == 2**num_pairs
    if num_pairs <= 7:
        for p in range(P):
            means = [
                abs(np.mean(np.array(signs) * difference_EP[:, p]))
                for signs in itertools.product((1, -1), repeat=num_pairs)
            ]
            observed = abs(difference_EP[:, p].mean())
            want = np.mean([mean >= observed - 1e-12 for mean in means])
            assert result.p_P[p] == pytest.approx(want, abs=0)


def test_p_by_hand():
    # All of one sign: only the pattern itself and its mirror image reach the mean.
    assert sign_flip_test(np.array([[1.0], [2.0], [3.0]])).p_P == [2 / 8]
    # 1 + 1 - 1: |mean| 1/3 is the smallest there is, every pattern reaches it.
    assert sign_flip_test(np.array([[1.0], [1.0], [-1.0]])).p_P == [1]
    assert sign_flip_test(np.zeros((3, 1))).p_P == [1]
    assert sign_flip_test(np.zeros((40, 1))).p_P == [1]
    assert np.isnan(sign_flip_test(np.zeros((0, 2))).p_P).all()


def test_monte_carlo_p():
    rng = np.random.default_rng(7)
    difference_EP = rng.normal(0.4, 1, size=(16, 1))
    theirs = scipy.stats.permutation_test(
        (difference_EP[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    ours = sign_flip_test(difference_EP, resampling=Resampling(num_permutations=20000, seed=1))
    assert not ours.exact
    assert abs(ours.p_P[0] - theirs) < 4 * np.sqrt(theirs * (1 - theirs) / 20000)
    sure = sign_flip_test(np.full((60, 1), 5.0), resampling=Resampling(num_permutations=999))
    assert sure.p_P == [1 / 1000]  # (b + 1) / (m + 1) with b = 0: never 0
    again = sign_flip_test(difference_EP, resampling=Resampling(num_permutations=20000, seed=1))
    assert again.p_P == ours.p_P


def test_p_is_uniform_under_the_null():
    rng = np.random.default_rng(8)
    p = sign_flip_test(rng.normal(size=(30, 1000)), resampling=Resampling(num_permutations=399)).p_P
    # A thousand p values: the share below 5 % has a standard error of 0.7 %.
    assert abs((p <= 0.05).mean() - 0.05) < 0.03
    assert abs((p <= 0.5).mean() - 0.5) < 0.06


def test_auc_by_hand_with_ties():
    first, second = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [0.0]])
    # Second smaller: 2 < 3 and 0 < 1, 2, 3; one tie (2, 2) counts half: 4.5 of 6.
    result = chance_smaller(first, second)
    assert result.estimate == [4.5 / 6]
    mirrored = chance_smaller(second, first)
    assert mirrored.estimate == [1.5 / 6]


def test_auc_is_mann_and_whitneys_and_its_draws_are_those_of_a_loop():
    rng = np.random.default_rng(10)
    first, second = rng.integers(0, 9, (25, P)) * 1.0, rng.integers(0, 7, (31, P)) * 1.0
    result = chance_smaller(first, second, resampling=Resampling(num_resamples=4000))
    for p in range(P):
        u = scipy.stats.mannwhitneyu(first[:, p], second[:, p]).statistic
        assert result.estimate[p] == pytest.approx(u / (25 * 31), rel=1e-14)
        draws = []
        for _ in range(4000):
            a, b = rng.choice(first[:, p], 25), rng.choice(second[:, p], 31)
            draws.append(((b[:, None] < a) + 0.5 * (b[:, None] == a)).mean())
        low, high = np.quantile(draws, (0.025, 0.975))
        assert abs(result.low[p] - low) < 0.08 * (high - low)
        assert abs(result.high[p] - high) < 0.08 * (high - low)
        assert abs(result.bias[p]) < 0.01


def test_pairs_matter_to_auc():
    rng = np.random.default_rng(11)
    first = rng.normal(size=(80, 1))
    second = first + 0.1 + 0.05 * rng.normal(size=(80, 1))
    paired = chance_smaller(first, second, pairs=(np.arange(80),) * 2)
    single = chance_smaller(first, second)
    assert (paired.high - paired.low < 0.5 * (single.high - single.low)).all()


def test_sets_wholly_apart_have_no_interval_of_width_zero():
    first, second = np.arange(30.0)[:, None] + 100, np.arange(40.0)[:, None]
    apart = chance_smaller(first, second)
    exact = scipy.stats.binomtest(30, 30).proportion_ci(0.95, "exact")
    assert apart.estimate == [1] and apart.high == [1] and "wholly apart" in apart.note
    assert apart.low[0] == pytest.approx(exact.low, rel=1e-9)
    other = chance_smaller(second, first)
    assert other.estimate == [0] and other.low == [0]
    assert other.high[0] == pytest.approx(1 - exact.low, rel=1e-9)
    assert np.isnan(chance_smaller(first[:1], second).low).all()


def test_coverage_of_auc():
    """Two normal sets one standard deviation apart: AUC = Phi(1 / sqrt 2)."""
    rng = np.random.default_rng(12)
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    first, second = rng.normal(1, 1, (60, 600)), rng.normal(0, 1, (60, 600))
    result = chance_smaller(first, second, resampling=Resampling(num_resamples=500))
    share = ((result.low <= truth) & (truth <= result.high)).mean()
    print(f"coverage: AUC percentile {100 * share:.1f} %")
    assert 0.92 <= share <= 0.98


@pytest.mark.parametrize(
    ("name", "value"),
    [("protocol", "clean"), ("chat", "yes"), ("max_length", 128), ("dtype", "bfloat16")],
)
def test_another_protocol_is_refused_by_name(name, value):
    other = random_set(1, label="other", options={name: value})
    with pytest.raises(UserError, match=f"set and other are not comparable: {name} ") as caught:
        contrast(random_set(0), other, resampling=FAST)
    assert str(value) in str(caught.value)


def test_what_else_is_refused_or_allowed():
    ours = random_set(0)
    other_model = random_set(1, label="instruct", weights="b2")
    with pytest.raises(UserError, match="model weights a1 and b2"):
        check_comparable(ours, other_model)
    assert check_comparable(ours, other_model, same_model=False) is None
    # A base model is asked in plain text, its tuned version through the template.
    templated = random_set(1, label="instruct", weights="b2", options={"chat": "auto"})
    assert check_comparable(ours, templated, same_model=False) is None
    with pytest.raises(UserError, match="model config "):
        check_comparable(ours, random_set(1, num_layers=9))
    same = random_set(1, options={"date": "2020-01-01", "batch_tokens": 9, "method": "dense"})
    assert check_comparable(ours, same) is None
    without = random_set(1, label="old")
    del without.run["identity"]["options"]["dtype"]
    with pytest.raises(UserError, match='dtype "float32" and absent'):
        check_comparable(ours, without)
    with pytest.raises(UserError, match="different layers: 0-2 and 0-3"):
        check_comparable(ours, random_set(1, layers=4))
    with pytest.raises(UserError, match="different projections: q, k and q"):
        check_comparable(ours, set_of(np.ones((3, L, 1))))
    read = results([example(0, np.ones((L, P)), projections=("q", "k"))], {"authors_jsonl": "f"})
    authors = example_set(read, "authors")
    assert (
        check_comparable(ours, authors) == "protocol and model of authors unknown, so not compared"
    )


def test_the_whole_contrast_by_hand():
    # Second = 2 x first in layer 0, half of it in layer 2; the example factors are 1 and 3, mean 2.
    factor = np.array([1.0, 3.0] * 10)[:, None, None]
    curve = np.array([[1.0, 2.0], [4.0, 2.0], [2.0, 6.0]])
    change = np.array([[2.0], [1.0], [0.5]])
    first = set_of(factor * curve, "first")
    second = set_of(factor * curve * change, "second", truncated=[True] + [False] * 19)
    result = contrast(first, second, resampling=FAST)
    np.testing.assert_allclose(result.rd_LP.estimate, (change - 1) * np.ones(P), atol=1e-15)
    # The factors cancel in RD where instructions are paired: no width.
    np.testing.assert_allclose(result.rd_LP.low, result.rd_LP.high, atol=1e-12)
    np.testing.assert_allclose(result.mean_absolute_rd_P.estimate, [0.5, 0.5])
    want = 2 * ((curve * change).mean(axis=0) - curve.mean(axis=0))
    np.testing.assert_allclose(result.difference_P.estimate, want)
    # MAD of 2 (1, 4, 2) and 2 (2, 4, 1): 2 * 5/2 each; of 2 (2, 2, 6) and 2 (4, 2, 3): 4 and 3.
    np.testing.assert_allclose(result.mad_difference_P.estimate, [5 - 5, 3 - 4])
    assert result.largest.T.tolist() == [[0, 2, 1], [0, 2, 1]]
    per_example = (factor * curve).mean(axis=1), (factor * curve * change).mean(axis=1)
    np.testing.assert_array_equal(
        result.sign_flip.p_P,
        sign_flip_test(per_example[1] - per_example[0], resampling=FAST).p_P,
    )
    assert result.chance_smaller_P.estimate[1] == pytest.approx(
        np.mean(per_example[1][:, 1][:, None] < per_example[0][:, 1])
    )
    assert result.counts().loc["second"].to_dict() == {
        "used": 20, "in pairs": 20, "truncated": 1, "left out": 0, "why": "",
    }  # fmt: skip
    table = result.table()
    assert table.index.tolist() == ["q", "k"] and table.notna().all(axis=None)
    assert table.loc["q", "largest layers"] == "0, 2, 1"


def test_a_description_by_hand():
    factor = np.array([1.0, 3.0] * 15)[:, None, None]
    curve = np.array([1.0, 4.0, 2.0, 2.0])[:, None]
    result = describe(set_of(factor * curve).values(), FAST)
    np.testing.assert_allclose(result.curve_LP.estimate, 2 * curve)
    assert (result.curve_LP.low < 2 * curve).all() and (2 * curve < result.curve_LP.high).all()
    assert result.mean_P.estimate == [2 * 9 / 4] and result.mad_P.estimate == [2 * 5 / 3]
    np.testing.assert_array_equal(result.segment_mad_3P.estimate, [[np.nan], [4], [np.nan]])
    assert np.isfinite(result.segment_mad_3P.low[1]).all()


def test_what_a_description_cannot_have():
    partial = describe(random_set(0, num_layers=9).values(), FAST)
    assert partial.mad_P is None and partial.note.startswith("no MAD")
    two = describe(random_set(0, layers=2).values(), FAST)
    assert two.mad_P is not None and two.segment_mad_3P is None and "segments" in two.note
    one = describe(random_set(0, 1).values(), FAST)
    assert np.isnan(one.mad_P.low).all() and "fewer than 2" in one.mad_P.note


def test_what_a_contrast_cannot_have():
    single = contrast(random_set(0, 1), random_set(1, 1), resampling=FAST)
    assert np.isnan(single.rd_LP.low).all() and "fewer than 2 examples" in single.note
    assert single.sign_flip.p_P.tolist() == [1, 1]
    zero = np.random.default_rng(0).lognormal(size=(20, L, P))
    zero[:, 1] = 0
    result = contrast(set_of(zero, "zero"), random_set(1, 20), resampling=FAST)
    assert np.isnan(result.rd_LP.estimate[1]).all() and "reference is zero" in result.note
    assert np.isnan(result.mean_absolute_rd_P.low).all()
    partial = contrast(random_set(0, num_layers=9), random_set(1, num_layers=9), resampling=FAST)
    assert partial.mad_difference_P is None and "no MAD" in partial.note
    assert "MAD difference" not in partial.table()


def test_numbers_that_are_mostly_noise_say_so():
    first, second = (random_set(seed, 30, layers=41) for seed in (0, 1))
    noisy = contrast(first, second, resampling=FAST)
    assert "MAD difference: mostly noise" in noisy.note
    assert "mean |RD|: mostly noise" in noisy.note
    # One law for both sets: all of |RD| is noise, and the interval reaches down to nearly none.
    assert (noisy.mean_absolute_rd_P.low < 0.01 * noisy.mean_absolute_rd_P.estimate).all()
    assert (noisy.table()["mean |RD| bias"] > 0).all()
    assert "MAD: mostly noise" in describe(first.values(), FAST).note


def test_given_pairs_need_every_example():
    zero = np.ones((4, L, P))
    zero[0] = 0
    rows = [example(i, zero[i], projections=("q", "k"), sigma_max=zero[i] / 2) for i in range(4)]
    examples = example_set(results(rows, {"identity": identity(L)}), "zero")
    pairs = pair_by_instruction(examples, examples)
    with pytest.raises(UserError, match="the given pairs do not fit"):
        contrast(examples, examples, "sigma_ratio", pairs=pairs, resampling=FAST)
    result = contrast(examples, examples, "sigma_ratio", resampling=FAST)
    assert len(result.pairs) == 3
    assert result.counts()["why"].iloc[0] == "1 x sigma_ratio undefined in a matrix"
