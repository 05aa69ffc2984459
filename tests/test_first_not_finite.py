"""An example that is not finite is recorded with the place where that began, its neighbours as ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_configs import tiny_config

from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import TokenizedExample
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.programs import Programs
from jaxgrad.measure.rows import example_results
from jaxgrad.models.decoder import abstract_decoder, named_parameters, with_parameters
from jaxgrad.options import MeasureSettings
from jaxgrad.results import columns
from jaxgrad.runs.report_lines import MOST_REASONS, count_reasons
from jaxgrad.spectra import FINITE_FLAGS

CONFIG = tiny_config(
    vocab_size=61, width=24, mlp_width=40, num_heads=3, num_kv_heads=1, head_size=8
)
SHAPE = BatchShape(2, 20, 16)
WAYS = {
    "factored": {"method": "factored"},
    "dense": {"method": "dense"},
    "layerwise": {"layerwise": True},
}
TRIGGER = 7  # a token that the first example alone may have
ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj.weight", "model.layers.{}.mlp.{}_proj.weight"


def random_weights():
    rng = np.random.default_rng(0)
    _, state = abstract_decoder(CONFIG, jnp.float32)
    return {
        name: np.asarray(rng.standard_normal(leaf.shape) / 5 + ("norm" in name), np.float32)
        for name, leaf in named_parameters(state).items()
    }


WEIGHTS = random_weights()


@pytest.fixture(scope="module")
def programs():
    made = {}

    def get(way, selection="all"):
        if (way, selection) not in made:
            settings = MeasureSettings(select_parameters(CONFIG, selection), **WAYS[way])
            made[way, selection] = Programs(CONFIG, "float32", settings)
        return made[way, selection]

    return get


def batch(*, has_trigger=False, loss_scale=1.0):
    """Two examples; the first may hold the token `TRIGGER`, or have a loss of another scale."""
    rng = np.random.default_rng(1)
    B, T, S = SHAPE.num_examples, SHAPE.num_tokens, SHAPE.num_responses
    tokens_BT = rng.integers(TRIGGER + 1, CONFIG.vocab_size, (B, T), np.int32)
    tokens_BT[0, 1] = TRIGGER if has_trigger else TRIGGER + 1
    weights_BS = np.full((B, S), 1 / S)
    weights_BS[0] *= loss_scale
    return ExampleArrays(
        tokens_BT,
        np.tile(np.arange(S, dtype=np.int32) + T - S - 1, (B, 1)),
        rng.integers(0, CONFIG.vocab_size, (B, S), np.int32),
        weights_BS,
    )


def tokenized(b, tokens_T):
    example = Example(b, str(b), (Message("user", "a"),), "b")
    return TokenizedExample(example, tokens_T, np.arange(3, len(tokens_T)), False, None)


def rows_of(programs, weights, arrays):
    with jax.enable_x64(True):
        _, state = abstract_decoder(CONFIG, jnp.float32)
        state = with_parameters(state, {n: jnp.asarray(array) for n, array in weights.items()})
    loss_B, statistics = programs.measure(state, SHAPE, arrays)
    members = [tokenized(b, tokens_T) for b, tokens_T in enumerate(arrays.tokens_T)]
    return example_results(members, loss_B, statistics, programs.selection, CONFIG)


def planted(name, layer=None, value=np.nan):
    """The weights with one entry spoiled, of one layer where they are stacked."""
    weights = {key: array.copy() for key, array in WEIGHTS.items()}
    array = weights[name] if layer is None else weights[name][layer]
    array[(0,) * array.ndim] = value
    return weights


def scaled(factors):
    """The weights times powers of ten: (name, layer or None) -> factor."""
    weights = {key: array.copy() for key, array in WEIGHTS.items()}
    for (name, layer), factor in factors.items():
        weights[name][slice(None) if layer is None else layer] *= np.float32(factor)
    return weights


def assert_same_row(one, other):
    assert one.status == other.status == "ok" and one.loss == other.loss
    assert one.matrices.keys() == other.matrices.keys()
    for name in one.matrices:
        np.testing.assert_array_equal(one.matrices[name], other.matrices[name], strict=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "layer", "place"),
    [
        ("embedding", None, None),
        ("layers.attention_norm.weight", 1, ATTENTION.format(1, "q")),
        ("layers.attention.q.weight", 1, ATTENTION.format(1, "o")),
        ("layers.attention.o.weight", 1, MLP.format(1, "gate")),
        ("layers.mlp_norm.weight", 0, MLP.format(0, "gate")),
        ("layers.mlp.up.weight", 1, MLP.format(1, "down")),
        ("layers.mlp.down.weight", 1, ATTENTION.format(2, "q")),
        ("layers.mlp.down.weight", 2, "lm_head.weight"),
        ("final_norm.weight", None, "lm_head.weight"),
    ],
)
def test_the_forward_pass_goes_up(programs, way, value, name, layer, place):
    weights = planted(name, layer, value)
    arrays = batch()
    if name == "embedding":  # of a token that only the first example has
        arrays.tokens_T[0, 4] = 0
        place = ATTENTION.format(0, "q")
    rows = rows_of(programs(way), weights, arrays)
    told = f"loss is nan; first not finite in the forward pass at the input of {place}"
    for row in rows[: 1 if name == "embedding" else 2]:
        assert (row.status, row.reason, row.loss, row.matrices) == ("non_finite", told, None, {})
    if name == "embedding":
        assert rows[1].status == "ok"


@pytest.mark.parametrize("way", WAYS)
def test_behind_the_last_input_there_is_the_loss(programs, way):
    first, _ = rows_of(programs(way), planted("lm_head.weight"), batch())
    assert first.reason == (
        "loss is nan; first not finite in the forward pass between the input of lm_head.weight and "
        "the loss"
    )


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_in_one_examples_forward_pass_leaves_its_neighbour_alone(programs, way):
    """Entry 0 of the stream is `TRIGGER`'s alone, and opens a unit of layer 1 that overflows."""
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embedding"][:, 0] = 0
    weights["embedding"][TRIGGER, 0] = 10
    weights["layers.attention.o.weight"][:, 0] = 0
    weights["layers.mlp.down.weight"][:, 0] = 0
    weights["layers.mlp.gate.weight"][1, 5], weights["layers.mlp.up.weight"][1, 5] = 0, 0
    weights["layers.mlp.gate.weight"][1, 5, 0], weights["layers.mlp.up.weight"][1, 5, 0] = 9, 9
    weights["layers.mlp.down.weight"][1, 1:, 5] = 3e38
    # The unit's own derivative must be finite where it is shut: 3e38 times one of the loss's size.
    rest = {"loss_scale": 1e-9}
    arrays, calm = (batch(has_trigger=t, **rest) for t in (True, False))
    arrays.weights_S[1] *= 1e-9
    calm.weights_S[1] *= 1e-9
    first, second = rows_of(programs(way), weights, arrays)
    assert first.reason == (
        "loss is nan; first not finite in the forward pass at the input of "
        + ATTENTION.format(2, "q")
    )
    undisturbed = rows_of(programs(way), weights, calm)
    assert undisturbed[0].status == "ok"
    assert_same_row(second, undisturbed[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("gains", "place"),
    [
        # Each pair leaves the forward pass as it was and is a gain of 1e8 in the backward pass.
        ({("lm_head.weight", None): 1e8, ("final_norm.weight", None): 1e-8}, MLP.format(2, "down")),
        (
            {("layers.mlp.down.weight", 1): 1e8, ("layers.mlp.up.weight", 1): 1e-8},
            MLP.format(1, "gate"),
        ),
        (
            {
                ("layers.mlp.up.weight", 1): 1e8,
                ("layers.mlp.gate.weight", 1): 1e8,
                ("layers.mlp_norm.weight", 1): 1e-8,
            },
            ATTENTION.format(1, "o"),
        ),
        (
            {("layers.attention.o.weight", 1): 1e8, ("layers.attention.v.weight", 1): 1e-8},
            ATTENTION.format(1, "q"),
        ),
    ],
)
def test_an_overflow_in_the_backward_pass_alone_goes_down(programs, way, gains, place):
    weights = scaled(gains)
    first, second = rows_of(programs(way), weights, batch(loss_scale=1e35))
    assert first.status == "non_finite" and first.matrices == {}
    assert first.reason == (
        f"loss is finite; first not finite in the backward pass at the output of {place}"
    )
    undisturbed = rows_of(programs(way), weights, batch())
    assert undisturbed[0].status == "ok"
    assert_same_row(second, undisturbed[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_finite_factors_that_overflows(programs, way):
    """X of 1e8 and D near 1e33: their product is beyond float32, and only method dense forms it."""
    projections = ("q", "k", "v")
    gains = {(f"layers.attention.{name}.weight", 1): 1e-8 for name in projections}
    gains[("layers.attention_norm.weight", 1)] = 1e8
    first, second = rows_of(programs(way), scaled(gains), batch(loss_scale=1e35))
    assert second.status == "ok"
    if way == "dense":
        assert first.reason == (
            "loss is finite; first not finite in the statistics, which overflow, of the finite "
            f"factors of {ATTENTION.format(1, 'q')}"
        )
    else:
        assert first.status == "ok" and np.isfinite(first.matrices["nuclear_norm"]).all()


def test_what_is_not_measured_is_not_seen(programs):
    chosen = programs("factored", "attention")
    told = {
        layer: rows_of(chosen, planted("layers.mlp.up.weight", layer), batch())[0].reason
        for layer in (1, 2)
    }
    partly = ", first among the measured weights"
    start = "loss is nan; first not finite in the forward pass "
    assert told[1] == f"{start}at the input of {ATTENTION.format(2, 'q')}{partly}"
    last = ATTENTION.format(2, "o")
    assert told[2] == f"{start}between the input of {last} and the loss{partly}"


def test_the_flags_are_no_columns():
    assert set(FINITE_FLAGS).isdisjoint(column.name for column in columns.MATRICES)


def test_a_column_that_no_reducer_declares_is_refused_and_not_dropped(programs):
    chosen, arrays = programs("factored", "attention"), batch()
    with jax.enable_x64(True):
        _, state = abstract_decoder(CONFIG, jnp.float32)
        state = with_parameters(state, {n: jnp.asarray(array) for n, array in WEIGHTS.items()})
    loss_B, measured = chosen.measure(state, SHAPE, arrays)
    for columns_of_one in measured.values():
        columns_of_one["unheard_of"] = columns_of_one["nuclear_norm"]
    item = tokenized(0, arrays.tokens_T[0])
    with pytest.raises(KeyError, match="unheard_of"):
        example_results([item], loss_B, measured, chosen.selection, CONFIG)


def test_few_reasons_are_all_counted():
    assert count_reasons(["b", "a", "b"]) == {"a": 1, "b": 2}


def test_of_many_reasons_the_most_frequent_are_listed_and_the_rest_is_summed():
    reasons = [f"reason {k:02d}" for k in range(MOST_REASONS + 3) for _ in range(k + 1)]
    counted = count_reasons(reasons)
    others = "one of 3 other reasons (they stand in the table of examples)"
    assert counted.pop(others) == 1 + 2 + 3
    assert counted == {f"reason {k:02d}": k + 1 for k in range(3, MOST_REASONS + 3)}
    assert sum(counted.values()) + 6 == len(reasons)
    # Of equally frequent ones the first by name stay, whatever the order they came in.
    equal = [f"reason {k:02d}" for k in reversed(range(MOST_REASONS + 1))]
    assert "reason 00" in count_reasons(equal) and equal[0] not in count_reasons(equal)
