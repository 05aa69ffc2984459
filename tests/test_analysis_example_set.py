"""A run as arrays: every value in its place, every statistic by its definition, nobody lost silently."""

import numpy as np
import pandas as pd
import pytest
from analysis_runs import PROJECTIONS, example, results, set_of

from jaxgrad.analysis import example_set, mean_curves
from jaxgrad.errors import UserError

L = 3


def norms(index):
    """Distinct for every example, layer and projection."""
    return 100.0 * index + 10 * np.arange(1, L + 1)[:, None] + np.arange(1, 5)


def test_every_value_in_its_place_and_everyone_left_out_is_named():
    missing = example(4, norms(4)[:2])
    rows = [
        example(0, norms(0), truncated=True),
        example(1, norms(1), status="skipped"),
        example(2, norms(2), status="non_finite"),
        example(3, norms(3), layers=(2, 0, 1), tokens=11),  # in another order in the file
        missing,
        example(5, np.where(norms(5) == norms(5)[1, 2], np.nan, norms(5))),
        example(6, norms(6), loss=np.inf),
    ]
    examples = example_set(results(rows, num_layers=L), "run")
    assert examples.layers == (0, 1, 2) and examples.projections == PROJECTIONS
    values = examples.values()
    np.testing.assert_array_equal(values.value_ELP, [norms(0), norms(3)[[1, 2, 0]]])
    np.testing.assert_array_equal(values.per_example, values.value_ELP.mean(axis=1))
    assert examples.example_ids == ("id-0", "id-3")
    assert examples.response_tokens.tolist() == [7, 11]
    assert examples.num_truncated == 1 and examples.has_every_layer
    assert {item.example_index: item.reason for item in examples.left_out} == {
        1: "skipped: why skipped",
        2: "non_finite: why non_finite",
        4: "4 of 12 matrices missing",
        5: "nuclear norm not finite in 1 of 12 matrices",
        6: "loss not finite",
    }
    assert examples.num_examples + len(examples.left_out) == len(rows)
    assert sum(examples.reasons().values()) == 5


def test_the_mean_over_examples_is_the_mean_curve_of_the_table():
    read = results([example(i, norms(i)) for i in range(3)], num_layers=L)
    want = mean_curves(read.matrices)
    got = example_set(read, "run").values().value_ELP.mean(axis=0)
    np.testing.assert_allclose(want, got, rtol=1e-14)


def test_every_statistic_by_its_definition():
    columns = dict(sigma_max=norms(0) / 4, effective_rank=norms(0) / 8, rank_bound=norms(0) // 2)
    rows = [example(0, norms(0), tokens=7, loss=2.5, **columns)]
    examples = example_set(results(rows, num_layers=L), "run")
    one = {name: examples.values(name).value_ELP[0] for name in (
        "sigma_ratio", "effective_rank", "effective_rank_fraction", "loss_normalised_norm",
        "sum_loss_norm",
    )}  # fmt: skip
    np.testing.assert_array_equal(one["sigma_ratio"], np.full((L, 4), 0.25))
    np.testing.assert_array_equal(one["effective_rank"], norms(0) / 8)
    np.testing.assert_array_equal(one["effective_rank_fraction"], norms(0) / 8 / (norms(0) // 2))
    np.testing.assert_allclose(one["loss_normalised_norm"], norms(0) / 2.5, rtol=1e-15)
    np.testing.assert_array_equal(one["sum_loss_norm"], norms(0) * 7)


def test_an_undefined_value_leaves_the_example_out_of_that_statistic_alone():
    zero = norms(1)
    zero[2, 3] = 0.0
    rank = np.where(zero == 0, np.nan, 2.0)
    full = np.full((L, 4), 2.0)
    rows = [
        example(0, norms(0), sigma_max=full, effective_rank=full),
        example(1, zero, sigma_max=np.where(zero == 0, 0.0, 2.0), effective_rank=rank),
    ]
    examples = example_set(results(rows, num_layers=L), "run")
    assert examples.num_examples == 2 and not examples.left_out
    for name in ("sigma_ratio", "effective_rank"):
        values = examples.values(name)
        assert values.examples.example_ids == ("id-0",) and len(values.value_ELP) == 1
        assert values.examples.reasons() == {f"{name} undefined in a matrix": 1}
        assert np.isfinite(values.value_ELP).all()
    assert examples.values().examples.num_examples == 2
    only = example_set(results(rows[1:], num_layers=L), "only")
    with pytest.raises(UserError, match="only: sigma_ratio is defined for none"):
        only.values("sigma_ratio")


def test_duplicates_are_counted_over_the_whole_file():
    rows = [
        example(0, norms(0), instruction="a"),
        example(1, norms(1), instruction="a", status="skipped"),
        example(2, norms(2), instruction="b"),
        example(3, norms(3), instruction="a"),
    ]
    examples = example_set(results(rows, num_layers=L), "run")
    assert examples.index_E.tolist() == [0, 2, 3]
    assert examples.occurrence_E.tolist() == [0, 0, 2]


def test_which_projections():
    measured = ("q", "k", "gate")
    rows = [example(0, norms(0)[:, :3], projections=measured)]
    read = results(rows, num_layers=L)
    assert example_set(read, "run").projections == ("q", "k")
    chosen = example_set(read, "run", projections=("gate", "k"))
    assert chosen.projections == ("k", "gate")
    np.testing.assert_array_equal(chosen.values().value_ELP[0], norms(0)[:, 1:3])
    with pytest.raises(UserError, match="o asked for, q, k, gate measured"):
        example_set(read, "run", projections=("q", "o"))
    only_mlp = results([example(0, norms(0)[:, :2], projections=("gate", "up"))], num_layers=L)
    assert example_set(only_mlp, "run").projections == ("gate", "up")


def test_a_layer_that_was_not_measured_leaves_no_mad():
    assert set_of(np.ones((2, L, 2))).has_every_layer
    assert not set_of(np.ones((2, L, 2)), num_layers=L + 1).has_every_layer
    rows = [example(0, norms(0), layers=(0, 1, 3))]
    authors = {"authors_jsonl": "somewhere"}
    assert not example_set(results(rows, authors), "run").has_every_layer


def duplicate_matrix():
    return [example(0, norms(0), layers=(0, 1, 1))]


MALFORMED = {
    "is not finished": ([example(0, norms(0))], {"finished": False}),
    "layer 1 q twice": (duplicate_matrix(), None),
    "an example twice": ([example(0, norms(0)), example(0, norms(0))], None),
    "not one of 2 examples was measured": (
        [example(i, norms(i), status="skipped") for i in range(2)], None,
    ),
    "not one of 0 examples": ([], None),
    "not one of 1 examples can be used: loss not finite": (
        [example(0, norms(0), loss=np.nan)], None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed(message):
    rows, run = MALFORMED[message]
    with pytest.raises(UserError, match=message) as caught:
        example_set(results(rows, run, L), "the run")
    assert str(caught.value).startswith("the run: ") and "\n" not in str(caught.value)


def test_tables_that_do_not_fit_together():
    read = results([example(0, norms(0)), example(1, norms(1))], num_layers=L)
    headless = type(read)(read.run, read.examples[1:], read.matrices)
    with pytest.raises(UserError, match="matrices table has example 0"):
        example_set(headless, "run")
    holed = read.matrices[(read.matrices["layer"] != 1) | (read.matrices["projection"] != "v")]
    with pytest.raises(UserError, match="layer 1 v was measured for no example"):
        example_set(type(read)(read.run, read.examples, holed), "run")
    nothing = type(read)(read.run, read.examples, read.matrices[:0])
    with pytest.raises(UserError, match="no matrix of a layer"):
        example_set(nothing, "run")


def test_a_statistic_that_is_not_there():
    examples = set_of(np.ones((2, L, 2)))
    with pytest.raises(UserError, match="No statistic 'norm': there are nuclear_norm"):
        examples.values("norm")
    with pytest.raises(UserError, match="set: effective_rank was not measured"):
        examples.values("effective_rank_fraction")


def test_the_authors_files_say_nothing_of_tokens():
    read = results([example(0, norms(0))], {"authors_jsonl": "f"})
    read.examples["num_response_tokens"] = pd.array([None], "Int32")
    read.examples["truncated"] = pd.array([None], "boolean")
    examples = example_set(read, "authors")
    assert examples.num_truncated is None
    assert examples.values("loss_normalised_norm").value_ELP.shape == (1, L, 4)
    with pytest.raises(UserError, match="num_response_tokens was not measured"):
        examples.values("sum_loss_norm")


def test_texts_that_are_null():
    rows = [
        example(0, norms(0), instruction="a", response=None),
        example(1, norms(1), response=None),
        example(2, norms(2), status="skipped", response=None),
    ]
    read = results(rows, num_layers=L)
    read.examples["reason"] = None
    examples = example_set(read, "run")
    assert examples.responses == (None, None)
    assert examples.left_out[0].reason == "skipped"
