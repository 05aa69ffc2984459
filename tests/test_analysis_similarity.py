"""Mean similarities of a set: by hand, against a loop, and what is undefined or was not measured."""

import dataclasses
import time

import numpy as np
import pytest
from analysis_runs import PROJECTIONS, example, results, with_cosines

from jaxgrad.analysis import Resampling, Similarity, bootstrap, example_set, mean_similarity
from jaxgrad.errors import UserError

FAST = Resampling(num_resamples=200)
L, P, K = 3, 4, 5


def similarity(examples, resampling=FAST, **options):
    tables = results(examples, num_layers=L)
    return mean_similarity(tables, example_set(tables, "set", **options), resampling=resampling)


def measured(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(count, L, P, K)) + 0.5
    rows = [example(e, np.ones((L, P))) for e in range(count)]
    cosines = [with_cosines(row, g, **options) for row, g in zip(rows, gradients, strict=True)]
    return cosines, gradients


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_by_hand():
    """Unit vectors at known angles: their cosines are cosines of the angles between them."""
    angle_ELP = np.radians(
        [
            [[0, 0, 0, 60], [60, 0, 90, 60], [60, 180, 90, 0]],
            [[0, 0, 0, 0], [90, 0, 0, 90], [0, 0, 0, 90]],
        ]
    )
    gradients = np.stack([np.cos(angle_ELP), np.sin(angle_ELP)], axis=-1)
    found = similarity([with_cosines(example(e, np.ones((L, P))), gradients[e]) for e in range(2)])
    assert isinstance(found, Similarity)
    assert (found.layers, found.projections) == ((0, 1, 2), PROJECTIONS)
    assert (found.num_examples, found.num_undefined) == (2, 0)
    # q: layers 0 and 1 are 60 degrees apart, then 90; 1 and 2 are 0, then 90; 0 and 2 are 60, then 0.
    want_q = [[1, 0.25, 0.75], [0.25, 1, 0.5], [0.75, 0.5, 1]]
    np.testing.assert_allclose(found.layer_cosine_PLL[0], want_q, atol=1e-15)
    # k: 0, 0 and 180 degrees in the first example, no angle in the second.
    want_k = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(found.layer_cosine_PLL[1], want_k, atol=1e-15)
    # v: 90 and 0 degrees; o: 0 and 60 degrees, then 90 and 0.
    np.testing.assert_allclose(
        found.adjacent_LP.estimate, [[0.25, 1, 0.5, 0.5], [0.5, 0, 1, 0.75]], atol=1e-15
    )
    # q and o: 60, 0, 60 degrees, then 0, 0, 90; k and v: 0, 90, 90, then 0, 0, 0.
    np.testing.assert_allclose(
        found.partner_L2.estimate, [[0.75, 1], [1, 0.5], [0.25, 0.5]], atol=1e-15
    )
    assert found.partner_L2.method == "percentile" and "only 2" in found.partner_L2.note


def test_against_a_loop_and_a_plain_bootstrap():
    examples, gradients = measured(23)
    found = similarity(examples)
    partner = np.array(
        [
            [[cosine(g[l, a], g[l, b]) for a, b in ((0, 3), (1, 2))] for l in range(L)]
            for g in gradients
        ]
    )
    adjacent = np.array(
        [
            [[cosine(g[l, p], g[l + 1, p]) for p in range(P)] for l in range(L - 1)]
            for g in gradients
        ]
    )
    for interval, values in ((found.partner_L2, partner), (found.adjacent_LP, adjacent)):
        want = bootstrap(lambda mean: mean, values, resampling=FAST)
        np.testing.assert_allclose(interval.estimate, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(interval.low, want.low, rtol=1e-12)
        np.testing.assert_allclose(interval.high, want.high, rtol=1e-12)
        assert interval.note is None
    for p in range(P):
        want = [
            [np.mean([cosine(g[i, p], g[j, p]) for g in gradients]) for j in range(L)]
            for i in range(L)
        ]
        np.testing.assert_allclose(found.layer_cosine_PLL[p], want, rtol=1e-12)


def test_an_undefined_cosine_leaves_the_example_out():
    examples, gradients = measured(4)
    zero = gradients[1].copy()
    zero[2, 1] = 0  # one matrix: its list is all NaN, and an entry of the others' lists
    examples[1] = with_cosines(example(1, np.ones((L, P))), zero)
    found = similarity(examples)
    assert (found.num_examples, found.num_undefined) == (3, 1)
    want = similarity([row for row in examples if row.example_index != 1])
    np.testing.assert_array_equal(found.layer_cosine_PLL, want.layer_cosine_PLL)
    np.testing.assert_array_equal(found.partner_L2.low, want.partner_L2.low)
    # An example without cosines among others that have them is left out like it.
    assert similarity([*examples, example(4, np.ones((L, P)))]).num_undefined == 2


def test_no_example_with_every_cosine():
    examples, gradients = measured(2)
    for e in range(2):
        gradients[e, 0, 0] = 0
        examples[e] = with_cosines(example(e, np.ones((L, P))), gradients[e])
    found = similarity(examples)
    assert (found.num_examples, found.num_undefined) == (0, 2)
    assert found.layer_cosine_PLL is found.adjacent_LP is found.partner_L2 is None


def test_what_was_not_measured():
    assert similarity([example(0, np.ones((L, P)))]) is None
    pairs, _ = measured(3, layers=False)
    found = similarity(pairs)
    assert found.layer_cosine_PLL is None and found.adjacent_LP is None
    assert found.num_examples == 3 and np.isfinite(found.partner_L2.estimate).all()
    over_layers, _ = measured(3, partner=False)
    found = similarity(over_layers)
    assert found.partner_L2 is None and np.isfinite(found.adjacent_LP.low).all()


def test_the_examples_and_projections_of_the_set_alone():
    """Skipped examples, those left out, other projections and lm_head do not count."""
    examples, gradients = measured(4)
    bad = examples[2].matrices | {"nuclear_norm": np.full(L * P, np.nan)}
    examples[2] = dataclasses.replace(examples[2], matrices=bad)
    examples.append(example(4, np.ones((L, P)), status="skipped"))
    head = {name: [*column, None] for name, column in examples[0].matrices.items()}
    head["projection"][-1], head["nuclear_norm"][-1] = "lm_head", 1.0
    examples[0] = dataclasses.replace(examples[0], matrices=head)
    found = similarity(examples, projections=("q", "k", "o"))
    assert (found.num_examples, found.projections) == (3, ("q", "k", "o"))
    kept = gradients[[0, 1, 3]]
    want = np.mean([cosine(g[0, 3], g[2, 3]) for g in kept])
    assert found.layer_cosine_PLL[2, 0, 2] == pytest.approx(want, rel=1e-12)
    want = np.mean([cosine(g[1, 0], g[1, 3]) for g in kept])
    assert found.partner_L2.estimate[1, 0] == pytest.approx(want, rel=1e-12)
    # v is not of the set: k has no partner, and that is no fault of an example's.
    assert np.isnan(found.partner_L2.estimate[:, 1]).all() and found.num_undefined == 0


def test_lists_that_do_not_fit_the_layers():
    examples, _ = measured(2)
    examples[1].matrices["layer_cosines"][5] = np.ones(L + 1)
    with pytest.raises(UserError, match="set: example 1 has 4 cosines of layer 1 k, for 3 layers"):
        similarity(examples)


def test_one_layer_and_one_example():
    single = with_cosines(example(0, np.ones((1, P))), np.ones((1, P, K)))
    tables = results([single], num_layers=1)
    found = mean_similarity(tables, example_set(tables, "set"), resampling=FAST)
    assert found.adjacent_LP is None and found.layer_cosine_PLL.shape == (P, 1, 1)
    assert found.partner_L2.estimate[0, 0] == pytest.approx(1)
    assert np.isnan(found.partner_L2.low).all() and "fewer than 2" in found.partner_L2.note


def test_a_large_run_is_quick():
    """500 examples x 32 layers x 4 projections: 0.5 s on two busy cores."""
    rng = np.random.default_rng(0)
    norm, gradient = np.ones((32, P)), rng.normal(size=(32, P, K))
    rows = [with_cosines(example(0, norm), gradient)]
    rows += [dataclasses.replace(rows[0], example_index=e) for e in range(1, 500)]
    tables = results(rows, num_layers=32)
    examples = example_set(tables, "set")
    start = time.perf_counter()
    assert mean_similarity(tables, examples).num_examples == 500
    assert time.perf_counter() - start < 2
