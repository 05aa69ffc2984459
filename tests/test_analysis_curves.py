"""MAD, segments and RD against values derived by hand and a plain transcription of the definitions."""

import numpy as np
import pytest

import jaxgrad.analysis
from jaxgrad.analysis import curves, segments
from jaxgrad.errors import UserError

# The authors' table, as they write it: both ends included.
AUTHORS = {
    28: ((0, 6), (7, 20), (21, 27)),
    26: ((0, 6), (7, 19), (20, 25)),
    32: ((0, 9), (10, 19), (20, 31)),
    42: ((0, 11), (12, 29), (30, 41)),
}


def transcribed_mad(curve, first, last):
    """1/(n-1) sum of |s_(i+1) - s_i| over layers first .. last, as a reader would do it."""
    total, steps = 0.0, 0
    for i in range(first, last):
        total += abs(curve[i + 1] - curve[i])
        steps += 1
    return total / steps


def rounded_half_up(numerator, denominator):
    return (2 * numerator + denominator) // (2 * denominator)


def expected_segments(n):
    """The stated rule with integers alone, for the depths that the tests use beside the authors'."""
    if n in AUTHORS:
        return AUTHORS[n]
    if n == 18:  # the fractions of 26: 7/26 and 20/26
        middle, last = rounded_half_up(18 * 7, 26), rounded_half_up(18 * 20, 26)
    else:  # 30, halfway between 28 and 32: (7/28 + 10/32) / 2 and (21/28 + 20/32) / 2
        assert n == 30
        middle = rounded_half_up(30 * (7 * 32 + 10 * 28), 2 * 28 * 32)
        last = rounded_half_up(30 * (21 * 32 + 20 * 28), 2 * 28 * 32)
    return (0, middle - 1), (middle, last - 1), (last, n - 1)


@pytest.mark.parametrize("n", [18, 26, 28, 30, 32, 42])
def test_curves_against_a_transcription_of_the_definitions(n):
    rng = np.random.default_rng(n)
    first_LP, second_LP = rng.lognormal(size=(2, n, 3))
    ends = expected_segments(n)
    assert tuple(map(tuple, segments(n))) == ends
    overall, by_segment = curves.mad(first_LP), curves.segment_mad(first_LP)
    rd_LP = curves.relative_difference(first_LP, second_LP)
    averaged = curves.mean_absolute_rd(first_LP, second_LP)
    largest = curves.largest_layers(rd_LP)
    assert by_segment.shape == (3, 3) and largest.shape == (5, 3)
    for p in range(3):
        curve = first_LP[:, p].tolist()
        assert overall[p] == pytest.approx(transcribed_mad(curve, 0, n - 1), rel=1e-13)
        assert jaxgrad.analysis.mean_absolute_difference(curve) == pytest.approx(overall[p])
        for which, (first, last) in enumerate(ends):
            want = transcribed_mad(curve, first, last)
            assert by_segment[which, p] == pytest.approx(want, rel=1e-13)
        rd = [(second_LP[i, p] - first_LP[i, p]) / first_LP[i, p] for i in range(n)]
        np.testing.assert_allclose(rd_LP[:, p], rd, rtol=1e-13)
        assert averaged[p] == pytest.approx(sum(map(abs, rd)) / n, rel=1e-13)
        assert largest[:, p].tolist() == sorted(range(n), key=lambda i: -abs(rd[i]))[:5]


def test_by_hand():
    curve_LP = np.array([[1.0, 5.0], [4.0, 5.0], [2.0, 5.0], [2.0, 5.0]])
    np.testing.assert_array_equal(curves.mad(curve_LP), [(3 + 2 + 0) / 3, 0.0])
    # Four layers: 0 | 1-2 | 3. Only the middle has a step inside, from 4 to 2.
    assert [tuple(s) for s in segments(4)] == [(0, 0), (1, 2), (3, 3)]
    np.testing.assert_array_equal(
        curves.segment_mad(curve_LP), [[np.nan] * 2, [2.0, 0.0], [np.nan] * 2]
    )
    other = np.array([[2.0, 5.0], [1.0, 5.0], [2.0, 4.0], [3.0, 10.0]])
    rd_LP = curves.relative_difference(curve_LP, other)
    np.testing.assert_array_equal(rd_LP[:, 0], [1.0, -0.75, 0.0, 0.5])
    np.testing.assert_allclose(curves.mean_absolute_rd(curve_LP, other), [2.25 / 4, 1.2 / 4])
    # Of the second projection's layers two have RD 0: the lower one comes first.
    assert curves.largest_layers(rd_LP).T.tolist() == [[0, 1, 3, 2], [3, 2, 0, 1]]


def test_a_reference_of_zero_has_no_rd():
    reference, other = np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]])
    np.testing.assert_array_equal(curves.relative_difference(reference, other), [[np.nan], [0.5]])
    assert np.isnan(curves.mean_absolute_rd(reference, other)).all()
    assert curves.largest_layers(np.array([[np.nan], [0.5]])).tolist() == [[1], [0]]


def test_resamples_before_the_layers_change_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=(2, 5, 26, 3))
    for function in (curves.mad, curves.segment_mad):
        np.testing.assert_allclose(function(a), [function(x) for x in a], rtol=1e-13)
    for function in (curves.relative_difference, curves.mean_absolute_rd):
        want = [function(x, y) for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(function(a, b), want, rtol=1e-13)


def test_segments_of_every_depth_cover_it_once():
    for n in range(3, 200):
        early, middle, last = segments(n)
        assert early.first == 0 and last.last == n - 1
        assert middle.first == early.last + 1 and last.first == middle.last + 1
        assert min(s.last - s.first for s in (early, middle, last)) >= 0


def test_no_rule_of_one_fraction_gives_the_authors_table():
    """Why the rule interpolates: whatever the fractions, proportional boundaries fail somewhere."""
    for which in (1, 2):
        starts = {n: ends[which][0] for n, ends in AUTHORS.items()}
        # round(f N) = b needs (b - 1/2) / N <= f <= (b + 1/2) / N at every N.
        assert max((b - 0.5) / n for n, b in starts.items()) > min(
            (b + 0.5) / n for n, b in starts.items()
        )


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_layers_have_no_segments(n):
    with pytest.raises(UserError, match=f"{n} layers has no early"):
        segments(n)
    assert np.isnan(curves.mad(np.ones((1, 2)))).all()
    assert np.isnan(jaxgrad.analysis.mean_absolute_difference([3.0]))
