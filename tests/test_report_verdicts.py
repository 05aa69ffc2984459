"""What becomes of a contrast under a control."""

import numpy as np
import pytest
from analysis_runs import set_of

from jaxgrad.analysis import Interval, Resampling
from jaxgrad.report.cells import Cell, Role
from jaxgrad.report.comparisons import compare
from jaxgrad.report.verdicts import direction, judge, verdict_of

FEW = Resampling(num_resamples=200, num_permutations=200)


def interval(low, high):
    low, high = np.array([low]), np.array([high])
    return Interval((low + high) / 2, low, high, 0 * low, 0.95, "percentile", 100)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -1, -1), (1, 2, 1), (-1, 1, 0), (0, 1, 0), (-1, 0, 0), (np.nan, 1, None)],
)
def test_the_side_of_an_interval(low, high, expected):
    assert direction(interval(low, high), 0) == expected


def test_without_an_interval_the_side_is_not_known():
    assert direction(None, 0) is None


@pytest.mark.parametrize(
    ("of_contrast", "under_control", "verdict"),
    [
        (-1, -1, "stands"),
        (1, 1, "stands"),
        (1, 0, "not shown"),
        (1, -1, "turns round"),
        (-1, 1, "turns round"),
        (0, 1, "no contrast"),
        (1, None, "not known"),
        (None, 1, "not known"),
    ],
)
def test_one_direction_against_the_other(of_contrast, under_control, verdict):
    assert judge(of_contrast, under_control) == verdict


def cells(norms, tokens, seed=0):
    """Two settings, 40 examples each, with these levels of the norm and numbers of tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for name, level, count in zip(("none", "detailed"), norms, tokens, strict=True):
        value_ELP = level * rng.uniform(0.95, 1.05, (40, 5, 2))
        examples = set_of(value_ELP, name, tokens=count)
        made.append(Cell(Role("m", "d", name), "", examples, None))
    return made


def test_a_difference_of_the_same_lengths_stands_under_all_controls():
    lengths = [10 + k % 7 for k in range(40)]
    found = verdict_of(compare("setting", *cells((4, 2), (lengths, lengths)), FEW), 0)
    assert found.direction == -1
    assert found.of_length == ("stands", "stands", "stands")


def test_a_difference_that_length_makes_turns_round_under_the_sum():
    # Norms fall as 1 / tokens^(1/2): their product with the tokens rises.
    short, long = [4 + k % 2 for k in range(40)], [100 + k % 3 for k in range(40)]
    comparison = compare("setting", *cells((5, 1), (short, long)), FEW)
    found = verdict_of(comparison, 1)
    assert found.sum_loss == "turns round"
    assert found.matched == "not known"  # no two of a length
    assert comparison.regression.overlap == 0
    assert found.regression == "not known"  # an extrapolation decides nothing


def test_no_difference_has_nothing_to_stand():
    lengths = [10 + k % 7 for k in range(40)]
    found = verdict_of(compare("setting", *cells((3, 3), (lengths, lengths)), FEW), 0)
    assert found.direction == 0
    assert set(found.of_length) == {"no contrast"}


def test_leaked_pairs_are_left_out_of_the_second_contrast():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.95, 1.05, (40, 5, 2))
    other = base.copy()
    other[:20] *= 3
    responses = [f"r{k}" for k in range(40)]
    shuffled = [f"other{k}" for k in range(20)] + responses[20:]
    correct = Cell(Role("m", "d", "none"), "", set_of(base, "c", response=responses), None)
    role = Role("m", "d", "none", "irrelevant")
    irrelevant = Cell(role, "", set_of(other, "i", response=shuffled), None)
    comparison = compare("response", correct, irrelevant, FEW)
    assert comparison.leakage.num_leaked == 20
    without = comparison.leakage.without
    assert without.first.examples.num_examples == 20
    np.testing.assert_allclose(without.ratio_P.estimate, 3, rtol=1e-12)
    assert verdict_of(comparison, 0).leakage == "stands"
