"""What can be analysed: every stored number, what is derived of them, by which loss, at which address."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from analysis_runs import PROJECTIONS, example, identity, results, set_of, with_cosines

from jaxgrad.analysis import (
    DEFAULT_STATISTICS,
    STATISTICS,
    Resampling,
    Statistic,
    check_comparable,
    contrast,
    describe,
    example_set,
    find_statistic,
    mean_curves,
    mean_similarity,
    statistics,
    sum_loss_contrast,
    summary_table,
)
from jaxgrad.errors import UserError
from jaxgrad.results.columns import ADDRESS, MATRICES, Column
from jaxgrad.results.losses import loss_of

L, P = 3, 4
FAST = Resampling(num_resamples=200, num_permutations=199)


def numbers(seed, shape=(L, P)):
    return np.random.default_rng(seed).lognormal(size=shape)


def rows(count=12, **constant):
    """Examples with a number in every stored column, each different."""
    return [
        example(
            e, numbers(e),
            **{name: numbers(1000 * k + e) for k, name in enumerate(stored_names(), 1)} | constant,
        )
        for e in range(count)
    ]  # fmt: skip


def stored_names():
    return [
        column.name
        for column in MATRICES
        if pa.types.is_float64(column.type) and column.name != "nuclear_norm"
    ]


def run(loss=None, **options):
    chosen = options if loss is None else options | {"loss": loss}
    return {"finished": True, "identity": identity(L, **chosen)}


def test_every_stored_number_is_a_statistic_with_what_its_column_says():
    declared = {column.name: column for column in MATRICES}
    assert {
        "nuclear_norm", "sigma_max", "sigma_min", "frobenius_norm", "entry_mean", "entry_max",
        "entry_min", "effective_rank", "stable_rank", "condition_number", "partner_cosine",
        "rank_bound",
    } <= set(STATISTICS)  # fmt: skip
    assert not set(STATISTICS) & {column.name for column in ADDRESS}
    assert not set(STATISTICS) & {"singular_values", "layer_cosines"}
    for name, column in declared.items():
        if name in STATISTICS:
            found = find_statistic(name)
            assert (found.columns, found.unit) == ((name,), column.unit)
            assert (found.definition, found.title) == (column.definition, column.heading)
    assert tuple(STATISTICS)[: len(DEFAULT_STATISTICS)] == DEFAULT_STATISTICS


@pytest.mark.parametrize("name", [*STATISTICS])
def test_every_statistic_is_described_and_compared(name):
    ours = example_set(results(rows(rank_bound=np.full((L, P), 9)), run()), "ours")
    other = example_set(results(rows(9, rank_bound=np.full((L, P), 9)), run()), "other")
    values = ours.values(name)
    assert values.value_ELP.shape == (12, L, P) and values.statistic == name
    if name in stored_names():
        np.testing.assert_array_equal(values.value_ELP[5].ravel(), rows()[5].matrices[name])
    assert describe(values, FAST).mad_P is not None
    assert contrast(ours, other, name, resampling=FAST).difference_P.estimate.shape == (P,)
    about = find_statistic(name).about
    assert about.startswith(find_statistic(name).title) and about.endswith(".")


@pytest.mark.parametrize("name", ["stable_rank", "condition_number"])
def test_an_undefined_rank_or_condition_leaves_the_example_out(name):
    given = rows(3)
    given[1].matrices[name][7] = np.nan
    found = example_set(results(given, run()), "run").values(name)
    assert found.examples.example_ids == ("id-0", "id-2")
    assert found.examples.reasons() == {f"{name} undefined in a matrix": 1}
    given = [example(0, numbers(0), **{name: np.where(numbers(0) > 0, np.nan, 1)})]
    given.append(example(1, numbers(1), **{name: numbers(1) * [[1, 1, 1, np.nan]]}))
    only = example_set(results(given, run()), "only")
    with pytest.raises(UserError, match=f"only: {name} is defined for none .*gradient is zero"):
        only.values(name)


def test_a_column_that_this_version_does_not_know_is_analysed_by_its_name():
    read = results(rows(4), run())
    later = numbers(7, 4 * L * P)
    read.matrices["spectral_flatness"] = later
    read.matrices["flag"], read.matrices["note"] = True, "text"
    examples = example_set(read, "later")
    np.testing.assert_array_equal(
        examples.values("spectral_flatness").value_ELP, later.reshape(4, L, P)
    )
    assert not {"flag", "note"} & set(examples.column_ELP)
    found = find_statistic("spectral_flatness", stored=examples.column_ELP)
    assert (found.title, found.axis) == ("Spectral flatness", "spectral flatness")
    with pytest.raises(UserError, match=r"No statistic 'flatness': there are .*spectral_flatness"):
        examples.values("flatness")
    without = example_set(results(rows(4), run()), "earlier")
    with pytest.raises(UserError, match="No statistic 'spectral_flatness'"):
        without.values("spectral_flatness")


def test_a_declared_column_that_a_run_lacks_is_not_measured():
    read = results([example(e, numbers(e)) for e in range(3)], run())
    earlier = type(read)(read.run, read.examples, read.matrices.drop(columns="stable_rank"))
    for tables in (read, earlier):
        with pytest.raises(UserError, match="run: stable_rank was not measured"):
            example_set(tables, "run").values("stable_rank")


def test_a_score_of_the_examples_columns_has_one_value_an_example(monkeypatch):
    """A declaration with its formula is all that a derived statistic needs."""
    score = Statistic(
        name="total_loss", columns=("loss", "num_response_tokens"),
        formula=lambda loss, tokens: loss * tokens, unit="nats", definition="loss times tokens",
        source="", undefined_when="", title="Total loss", axis="total loss", short="total",
    )  # fmt: skip
    monkeypatch.setattr(statistics, "STATISTICS", {**STATISTICS, "total_loss": (score,)})
    given = [example(e, numbers(e), loss=2.0 + e, tokens=5) for e in range(3)]
    value_ELP = example_set(results(given, run()), "run").values("total_loss").value_ELP
    np.testing.assert_array_equal(value_ELP, np.full((3, L, P), 1.0) * [[[10.0]], [[15]], [[20]]])


def test_the_words_for_a_column():
    bare = Column("kurtosis_of_rows", pa.float64(), "", "fourth moment")
    assert (bare.heading, bare.axis_label, bare.short_label) == (
        "Kurtosis of rows", "kurtosis of rows", "kurtosis of rows",
    )  # fmt: skip
    assert find_statistic("effective_rank").sentence.startswith("exp(")
    assert find_statistic("sigma_max").sentence == "Largest sigma."


# Addresses


def mixed(count=3):
    """A layer with whole q, k, v, o, an adapter's part of q, and two experts of up; in no order."""
    names = ("up", "q", "o", "q", "up", "v", "k")
    expert = [[10, None, None, None, 2, None, None]] * L
    part = [[None, "lora_A", None, None, None, None, None]] * L
    return [
        example(e, numbers(e, (L, 7)), projections=names, expert=expert, part=part)
        for e in range(count)
    ]


def test_experts_and_parts_never_stand_among_whole_weights():
    read = results(mixed(), run())
    examples = example_set(read, "run")
    assert examples.projections == PROJECTIONS
    whole = [3, 6, 5, 2]
    np.testing.assert_array_equal(examples.values().value_ELP[1], numbers(1, (L, 7))[:, whole])
    asked = example_set(read, "run", projections=("up.10", "q", "up.2", "q.lora_A"))
    assert asked.projections == ("q", "q.lora_A", "up.2", "up.10")
    np.testing.assert_array_equal(asked.values().value_ELP[1], numbers(1, (L, 7))[:, [3, 1, 4, 0]])
    with pytest.raises(
        UserError, match=r"up asked for, q, q.lora_A, k, v, o, up.2, up.10 measured"
    ):
        example_set(read, "run", projections=("up",))
    with pytest.raises(UserError, match=r"different projections: q, k, v, o and q, q\.lora_A"):
        check_comparable(examples, asked)


def test_without_whole_weights_the_experts_are_the_default():
    given = [example(0, numbers(0, (L, 2)), projections=("up", "up"), expert=[[1, 0]] * L)]
    assert example_set(results(given, run()), "run").projections == ("up.0", "up.1")
    names = ("gate", "up", "up")
    given = [example(0, numbers(0, (L, 3)), projections=names, expert=[[None, 0, 1]] * L)]
    assert example_set(results(given, run()), "run").projections == ("gate",)


def test_the_same_expert_twice_is_a_damaged_table():
    given = [example(0, numbers(0, (L, 2)), projections=("up", "up"), expert=[[1, 1]] * L)]
    with pytest.raises(UserError, match=r"layer 0 up\.1 twice"):
        example_set(results(given, run()), "run")


def test_a_table_without_experts_and_parts_has_whole_weights():
    read = results(rows(3), run())
    earlier = type(read)(read.run, read.examples, read.matrices.drop(columns=["expert", "part"]))
    for name in ("nuclear_norm", "condition_number"):
        np.testing.assert_array_equal(
            example_set(earlier, "run").values(name).value_ELP,
            example_set(read, "run").values(name).value_ELP,
        )
    np.testing.assert_array_equal(mean_curves(earlier.matrices), mean_curves(read.matrices))
    cosines = [with_cosines(row, numbers(k, (L, P, 5))) for k, row in enumerate(rows(3))]
    read = results(cosines, run())
    earlier = type(read)(read.run, read.examples, read.matrices.drop(columns=["expert", "part"]))
    found = [mean_similarity(t, example_set(t, "run"), resampling=FAST) for t in (read, earlier)]
    np.testing.assert_array_equal(*(one.layer_cosine_PLL for one in found))


def test_the_short_table_has_a_column_for_each_address():
    curves = mean_curves(results(mixed(), run()).matrices)
    assert list(curves) == ["up.10", "q.lora_A", "o", "q", "up.2", "v", "k"]
    want = np.mean([numbers(e, (L, 7)) for e in range(3)], axis=0)
    np.testing.assert_allclose(curves, want, rtol=1e-14)
    summary = summary_table({"run": results(mixed(), run()).matrices})
    assert ("up.2", "MAD") in summary.columns


# Losses


def test_the_loss_of_a_run():
    assert loss_of(run()) == loss_of({"authors_jsonl": "f"}) == loss_of({}) == "response_mean"
    assert loss_of(run("response_sum")) == "response_sum"


def test_the_norm_of_the_summed_loss_by_the_loss_that_was_measured():
    given = [example(e, numbers(e), tokens=5 + e) for e in range(3)]
    mean, summed, other = (
        example_set(results(given, run(loss)), str(loss)) for loss in (None, "response_sum", "odd")
    )
    tokens = np.array([5, 6, 7])[:, None, None]
    norm_ELP = mean.values().value_ELP
    np.testing.assert_array_equal(mean.values("sum_loss_norm").value_ELP, norm_ELP * tokens)
    np.testing.assert_array_equal(summed.values("sum_loss_norm").value_ELP, norm_ELP)
    with pytest.raises(UserError, match=r"odd: sum_loss_norm is not known .* of the loss odd"):
        other.values("sum_loss_norm")
    # What needs no loss, or divides the two that scale alike, is there for every loss.
    for examples in (summed, other):
        np.testing.assert_array_equal(
            examples.values("loss_normalised_norm").value_ELP, norm_ELP / 2
        )
    same = sum_loss_contrast(summed, summed, resampling=FAST)
    np.testing.assert_array_equal(same.ratio_P.estimate, 1)


def test_runs_of_two_losses_are_not_compared():
    mean = set_of(np.ones((3, L, 2)), "mean")
    named = set_of(np.ones((3, L, 2)), "named", options={"loss": "response_mean"})
    summed = set_of(np.ones((3, L, 2)), "summed", options={"loss": "response_sum"})
    authors = dataclasses.replace(mean, label="authors", run={"authors_jsonl": "f"})
    assert check_comparable(mean, named) is None
    assert check_comparable(summed, summed) is None
    for one in (mean, named, authors):
        for same_model in (True, False):
            with pytest.raises(UserError, match="different losses: response_mean and response_sum"):
                check_comparable(one, summed, same_model=same_model)
