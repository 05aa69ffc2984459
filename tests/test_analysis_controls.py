"""Controls: length and leakage, on sets whose only difference is known."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from analysis_runs import example, results, set_of

from jaxgrad.analysis import (
    Resampling,
    contrast,
    example_set,
    leakage_contrast,
    length_regression,
    match_response_tokens,
    matched_contrast,
    pair_by_instruction,
    sum_loss_contrast,
)
from jaxgrad.analysis.controls import leaked_pairs
from jaxgrad.errors import UserError

L, P = 3, 2
FAST = Resampling(num_resamples=200, num_permutations=199)


def of_length(tokens, label, *, factor=1.0, power=-0.5, noise=0.0, seed=0):
    """Norm = factor * tokens^power * noise, the same in every layer: its log is linear in ln tokens."""
    rng = np.random.default_rng(seed)
    scale = factor * np.power(np.asarray(tokens, float), power)
    value = scale * np.exp(noise * rng.normal(size=len(tokens)))
    return set_of(value[:, None, None] * np.ones((L, P)), label, tokens=[int(t) for t in tokens])


def test_the_sum_is_the_mean_times_the_tokens():
    rng = np.random.default_rng(0)
    value, tokens = rng.lognormal(size=(2, 12, L, P)), rng.integers(2, 40, size=(2, 12))
    sets = [
        set_of(v, str(i), tokens=t.tolist())
        for i, (v, t) in enumerate(zip(value, tokens, strict=True))
    ]
    scaled = [
        set_of(v * t[:, None, None], str(i))
        for i, (v, t) in enumerate(zip(value, tokens, strict=True))
    ]
    got, want = sum_loss_contrast(*sets, resampling=FAST), contrast(*scaled, resampling=FAST)
    for name in ("difference_P", "rd_LP", "mean_absolute_rd_P", "mad_difference_P"):
        for part in ("estimate", "low", "high"):
            np.testing.assert_array_equal(
                getattr(getattr(got, name), part), getattr(getattr(want, name), part)
            )
    np.testing.assert_array_equal(got.sign_flip.p_P, want.sign_flip.p_P)


def test_norms_that_fall_as_one_over_length_are_equal_in_the_sum():
    short = of_length(range(2, 22), "short", power=-1)
    long = of_length(range(50, 70), "long", power=-1)
    assert (contrast(short, long, resampling=FAST).rd_LP.estimate < -0.7).all()
    np.testing.assert_allclose(
        sum_loss_contrast(short, long, resampling=FAST).rd_LP.estimate, 0, atol=1e-12
    )


def test_matching_by_hand():
    match = match_response_tokens(
        of_length([3, 10, 20, 100], "one"), of_length([400, 22, 10, 2, 21], "two"), caliper=0.1
    )
    # 10 with 10, 20 with 21 (nearer than 22); 3 and 100 have nobody within 10 %.
    pairs = match.pairs
    tokens = (
        match.first.response_tokens[pairs.first],
        match.second.response_tokens[pairs.second],
    )
    assert [t.tolist() for t in tokens] == [[10, 20], [10, 21]]
    assert match.difference_after == pytest.approx(np.log(21 / 20) / 2)
    assert match.largest_after == pytest.approx(np.log(21 / 20))
    before = np.log([400, 22, 10, 2, 21]).mean() - np.log([3, 10, 20, 100]).mean()
    assert match.difference_before == pytest.approx(before)
    why = "no partner within 0.1 in log response tokens"
    assert match.first.reasons() == {why: 2} and match.second.reasons() == {why: 3}


def test_matching_is_the_best_of_all_matchings():
    rng = np.random.default_rng(1)
    for _ in range(20):
        one, two = rng.integers(5, 30, 4), rng.integers(5, 30, 5)
        caliper = 0.2
        best = (0, 0.0)
        for order in itertools.permutations(range(5), 4):
            gaps = np.abs(np.log(one) - np.log(two[list(order)]))
            inside = gaps[gaps <= caliper]
            best = min(best, (-len(inside), inside.sum()))
        match = match_response_tokens(of_length(one, "1"), of_length(two, "2"), caliper=caliper)
        gaps = np.abs(
            np.log(match.second.response_tokens[match.pairs.second])
            - np.log(match.first.response_tokens[match.pairs.first])
        )
        assert len(gaps) == -best[0] and gaps.sum() == pytest.approx(best[1])


def test_a_difference_of_length_alone_goes_when_lengths_match():
    rng = np.random.default_rng(2)
    one = of_length(rng.integers(5, 60, 80), "one")
    two = of_length(rng.integers(30, 200, 80), "two")
    match, result = matched_contrast(one, two, caliper=0.0, resampling=FAST)
    assert (contrast(one, two, resampling=FAST).rd_LP.estimate < -0.3).all()
    np.testing.assert_allclose(result.rd_LP.estimate, 0, atol=1e-12)
    assert len(match.pairs) == len(result.pairs) == result.sign_flip.num_pairs > 5
    assert match.difference_after == 0 and result.pairs.by == "response tokens"
    assert result.counts()["left out"].tolist() == [80 - len(match.pairs)] * 2


def test_nobody_matches():
    match, result = matched_contrast(of_length([2, 3], "one"), of_length([90, 99], "two"))
    assert result is None and len(match.pairs) == 0
    assert np.isnan(match.difference_after) and np.isnan(match.largest_after)
    for caliper in (-1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="caliper is"):
            match_response_tokens(of_length([2], "one"), of_length([2], "two"), caliper=caliper)


def test_regression_against_least_squares():
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, 50, 30), rng.integers(10, 90, 41)
    one = of_length(tokens[0], "one", noise=0.3, seed=4)
    two = of_length(tokens[1], "two", factor=0.8, noise=0.3, seed=5)
    for log_value in (True, False):
        result = length_regression(one, two, log_value=log_value, resampling=FAST)
        y = np.concatenate([one.values().per_example, two.values().per_example])
        y = np.log(y) if log_value else y
        group = np.repeat([0.0, 1.0], [30, 41])
        design = np.stack([np.ones(71), group, np.log(np.concatenate(tokens))], axis=1)
        _, b, c = np.linalg.lstsq(design, y)[0]
        np.testing.assert_allclose(result.adjusted_P.estimate, b, rtol=1e-9)
        np.testing.assert_allclose(result.slope_P.estimate, c, rtol=1e-9)
        plain = np.linalg.lstsq(design[:, :2], y)[0][1]
        np.testing.assert_allclose(result.contrast_P.estimate, plain, rtol=1e-9)
        assert result.note is None


def test_regression_tells_length_from_the_set():
    rng = np.random.default_rng(6)
    one = of_length(rng.integers(5, 60, 60), "one")
    two = of_length(rng.integers(20, 200, 60), "two", factor=0.5)
    result = length_regression(one, two, resampling=FAST)
    np.testing.assert_allclose(result.slope_P.estimate, -0.5, rtol=1e-9)
    np.testing.assert_allclose(result.adjusted_P.estimate, np.log(0.5), rtol=1e-9)
    assert (result.contrast_P.estimate < np.log(0.5) - 0.2).all()
    inside = (one.response_tokens >= two.response_tokens.min()).sum()
    inside += (two.response_tokens <= one.response_tokens.max()).sum()
    assert result.overlap == inside / 120


def test_coverage_of_the_adjusted_contrast():
    rng = np.random.default_rng(7)
    blank = [set_of(np.ones((60, 1, 1)), label) for label in ("one", "two")]
    hits = []
    for _ in range(400):
        sets = []
        for examples, factor, range_ in zip(blank, (1, 0.5), ((5, 60), (20, 90)), strict=True):
            tokens = rng.integers(*range_, 60).astype(float)
            norm = factor * tokens**-0.5 * np.exp(0.4 * rng.normal(size=60))
            column = examples.column_ELP | {"nuclear_norm": norm[:, None, None]}
            lengths = examples.column_E | {"num_response_tokens": tokens}
            sets.append(dataclasses.replace(examples, column_E=lengths, column_ELP=column))
        interval = length_regression(*sets, resampling=FAST).adjusted_P
        hits.append(bool(interval.low <= np.log(0.5) <= interval.high))
    print(f"coverage: adjusted contrast percentile {100 * np.mean(hits):.1f} %")
    assert 0.92 <= np.mean(hits) <= 0.98


def test_what_a_regression_cannot_tell():
    apart = length_regression(
        of_length(range(2, 32), "one", noise=0.1), of_length(range(90, 120), "two", noise=0.1),
        resampling=FAST,
    )  # fmt: skip
    assert apart.overlap == 0 and "extrapolation" in apart.note
    constant = length_regression(
        of_length([5] * 25, "1"), of_length([9] * 25, "2"), resampling=FAST
    )
    assert np.isnan(constant.adjusted_P.estimate).all() and "does not vary" in constant.note
    assert np.isnan(constant.slope_P.low).all() and np.isfinite(constant.contrast_P.estimate).all()
    zero = set_of(np.zeros((25, L, P)), "zero")
    with pytest.raises(UserError, match="nuclear_norm is not positive for an example"):
        length_regression(zero, of_length([5] * 25, "2"))


def test_lengths_that_are_unknown():
    read = results([example(i, np.ones((L, P)), projections=("q", "k")) for i in range(3)], {})
    read.examples["num_response_tokens"] = read.examples["num_response_tokens"].where(
        read.examples["example_index"] > 0
    )
    some = example_set(read, "some")
    match = match_response_tokens(some, some)
    assert match.first.reasons() == {"response tokens unknown": 1} and len(match.pairs) == 2
    read.examples["num_response_tokens"] = read.examples["num_response_tokens"].mask(
        read.examples["example_index"] >= 0
    )
    none = example_set(read, "none")
    for control in (match_response_tokens, length_regression, matched_contrast, sum_loss_contrast):
        with pytest.raises(UserError, match=r"^none: .*response.tokens "):
            control(none, none)


def test_leakage_by_hand():
    rng = np.random.default_rng(8)
    value = rng.lognormal(size=(6, L, P))
    other = value * 2
    leaked = [1, 4]
    other[leaked] = value[leaked]  # the same response has the same gradient
    answers = ["yes", "no", "7", "(A)", "no", "x"]
    correct = set_of(value, "correct", response=answers)
    shuffled = ["no", " no\n", "8", "(a)", "no", "y"]  # white space is stripped, case is not
    irrelevant = set_of(other, "irrelevant", response=shuffled)
    result = leakage_contrast(correct, irrelevant, resampling=FAST)
    assert (result.num_pairs, result.num_leaked) == (6, 2)
    keep = [0, 2, 3, 5]
    want = other.mean(axis=0) / value.mean(axis=0) - 1
    np.testing.assert_allclose(result.everything.rd_LP.estimate, want)
    np.testing.assert_allclose(result.without.rd_LP.estimate, 1.0)
    np.testing.assert_allclose(result.without.difference_P.estimate, value[keep].mean(axis=(0, 1)))
    for examples in (result.without.first.examples, result.without.second.examples):
        assert examples.reasons() == {"irrelevant response equals the correct one": 2}
        assert [item.example_index for item in examples.left_out] == leaked


def test_everything_leaks_or_nothing_is_known():
    sets = [set_of(np.ones((3, L, P)), name, response=["r"] * 3) for name in "ab"]
    result = leakage_contrast(*sets, resampling=FAST)
    assert result.num_leaked == 3 and result.without is None
    unknown = [set_of(np.ones((3, L, P)), name, response=[None] * 3) for name in "ab"]
    assert leakage_contrast(*unknown, resampling=FAST).num_leaked == 0


def test_the_authors_shuffled_answers_leak(shared_data):
    folders = shared_data / "cot_500", shared_data / "cot_500_wrong_answer_shuffle"
    for task in ("aqua", "gsm8k", "strategyqa"):
        files = [json.loads((f / f"{task}_train_no_cot.json").read_text("utf-8")) for f in folders]
        # In one order in both files, so that the lines themselves are the pairs.
        want = sum(a["output"].strip() == b["output"].strip() for a, b in zip(*files, strict=True))
        sets = []
        for label, records in zip(("correct", "irrelevant"), files, strict=True):
            texts = [(r["instruction"] + chr(10) + r.get("input", "")) for r in records]
            outputs = [r["output"] for r in records]
            sets.append(set_of(np.ones((500, 1, 1)), label, instruction=texts, response=outputs))
        pairs = pair_by_instruction(*sets)
        leaked = leaked_pairs(*sets, pairs)
        assert len(pairs) == 500 and leaked.sum() == want > 0


def test_controls_of_two_models_only_where_that_is_asked_for():
    """Base against instruction-tuned: the weights differ, and `same_model` says that they may."""
    rng = np.random.default_rng(9)
    base, tuned = (
        set_of(
            rng.lognormal(size=(25, L, P)),
            label,
            weights=label,
            tokens=rng.integers(5, 9, 25).tolist(),
        )
        for label in ("base", "tuned")
    )
    for control in (sum_loss_contrast, matched_contrast, length_regression, leakage_contrast):
        with pytest.raises(UserError, match="base and tuned are not comparable: model weights"):
            control(base, tuned, resampling=FAST)
    options = dict(same_model=False, resampling=FAST)
    assert sum_loss_contrast(base, tuned, **options).first.statistic == "sum_loss_norm"
    match, matched = matched_contrast(base, tuned, **options)
    assert matched is not None and len(matched.pairs) == len(match.pairs) > 0
    assert np.isfinite(length_regression(base, tuned, **options).adjusted_P.low).all()
    leakage = leakage_contrast(base, tuned, **options)  # every response is "r"
    assert leakage.num_leaked == 25 and leakage.without is None
