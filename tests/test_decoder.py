"""The decoder's config: every field changes a shape, an output or an error."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_configs import tiny_config
from flax import nnx

import jaxgrad
from jaxgrad.checkpoints import LoadedModel
from jaxgrad.errors import UserError
from jaxgrad.models import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.decoder import abstract_decoder, num_parameters
from jaxgrad.models.families.common import ACTIVATIONS

NUM_TOKENS = 11
LLAMA3 = Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16)
LONG = Rope(500.0, "longrope", 1.0, 1.0, 1.0, 7, (1.0, 1.5, 2.0), (2.0, 3.0, 5.0))
BASE = tiny_config()


def of_kind(rope: Rope | None, window: int | None = None) -> DecoderConfig:
    return dataclasses.replace(BASE, kinds=(AttentionKind(rope, window),))


TWO_KINDS = dataclasses.replace(
    BASE, kinds=(*BASE.kinds, AttentionKind(Rope(9.0), 3)), layer_kinds=(0, 0, 1)
)


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    _, state = abstract_decoder(config, jnp.float32)
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


@functools.cache
def logits(config: DecoderConfig) -> np.ndarray:
    """Logits of a decoder whose weights depend only on their shapes."""
    graphdef, abstract = abstract_decoder(config, jnp.float32)
    flat = []
    for path, leaf in nnx.to_flat_state(abstract):
        rng = np.random.default_rng(list(".".join(map(str, path)).encode()))
        flat.append((path, leaf.replace(jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32))))
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    tokens = jnp.arange(NUM_TOKENS, dtype=jnp.int32)
    outputs, _ = nnx.capture(model, nnx.Intermediate)(tokens, tokens)
    return np.asarray(outputs)


class FixedTokenizer:
    """What `analyze` needs of a tokenizer when there is no example."""

    chat_template = None


def allows_50_tokens(config: DecoderConfig) -> bool:
    graphdef, state = abstract_decoder(config, jnp.float32)
    model = LoadedModel("tiny", config, graphdef, state, FixedTokenizer(), "", "float32")
    try:
        return not list(jaxgrad.analyze(model, [], jaxgrad.AnalyzeOptions(max_length=50)))
    except UserError as error:
        assert "50" in str(error) and str(config.max_positions) in str(error)
        return False


# Field -> (the config that it is changed in, another value, what it must change).
FIELD_CASES = {
    "DecoderConfig.vocab_size": (BASE, 37, weight_shapes),
    "DecoderConfig.width": (BASE, 24, weight_shapes),
    "DecoderConfig.mlp_width": (BASE, 29, weight_shapes),
    "DecoderConfig.num_layers": (None, None, weight_shapes),  # with layer_kinds, below
    "DecoderConfig.num_heads": (BASE, 6, weight_shapes),
    "DecoderConfig.num_kv_heads": (BASE, 1, weight_shapes),
    "DecoderConfig.head_size": (BASE, 10, weight_shapes),
    "DecoderConfig.max_positions": (BASE, 41, allows_50_tokens),
    "DecoderConfig.activation": (BASE, "gelu", logits),
    "DecoderConfig.norm_epsilon": (BASE, 0.5, logits),
    "DecoderConfig.kinds": (BASE, (AttentionKind(Rope(900.0)),), logits),
    "DecoderConfig.layer_kinds": (TWO_KINDS, (0, 1, 0), logits),
    "DecoderConfig.tied_embeddings": (BASE, True, weight_shapes),
    "DecoderConfig.norm": (BASE, "rms_plus_one", logits),
    "DecoderConfig.norm_placement": (BASE, "both", weight_shapes),
    "DecoderConfig.qk_norm": (BASE, "head", weight_shapes),
    "DecoderConfig.qkv_bias": (BASE, True, weight_shapes),
    "DecoderConfig.output_bias": (BASE, True, weight_shapes),
    "DecoderConfig.mlp_bias": (BASE, True, weight_shapes),
    "DecoderConfig.attention_scale": (BASE, 0.3, logits),
    "DecoderConfig.scale_by_depth": (BASE, True, logits),
    "DecoderConfig.attention_softcap": (BASE, 0.5, logits),
    "DecoderConfig.logit_softcap": (BASE, 2.0, logits),
    "DecoderConfig.embedding_scale": (BASE, 1.5, logits),
    "DecoderConfig.residual_scale": (BASE, 0.5, logits),
    "DecoderConfig.logit_scale": (BASE, 0.5, logits),
    "DecoderConfig.parallel_residual": (BASE, True, logits),
    "DecoderConfig.gated_mlp": (BASE, False, weight_shapes),
    "DecoderConfig.learned_positions": (BASE, True, weight_shapes),
    "AttentionKind.rope": (BASE.kinds[0], None, logits),
    "AttentionKind.window": (BASE.kinds[0], 4, logits),
    "Rope.theta": (LLAMA3, 900.0, logits),
    "Rope.kind": (LLAMA3, "linear", logits),
    "Rope.factor": (LLAMA3, 9.0, logits),
    "Rope.low_frequency_factor": (LLAMA3, 0.5, logits),
    "Rope.high_frequency_factor": (LLAMA3, 5.0, logits),
    "Rope.original_length": (LLAMA3, 29, logits),
    "Rope.short_factors": (
        dataclasses.replace(LONG, original_length=99),
        (1.0, 1.0, 4.0),
        logits,
    ),
    "Rope.long_factors": (LONG, (1.0, 1.0, 4.0), logits),
    "Rope.rotated_fraction": (LLAMA3, 0.4, logits),
    "Rope.magnitude": (LONG, 1.3, logits),
}


@pytest.mark.parametrize(
    "field",
    [
        f"{c.__name__}.{f.name}"
        for c in (DecoderConfig, AttentionKind, Rope)
        for f in dataclasses.fields(c)
    ],
)
def test_every_field_changes_a_shape_an_output_or_an_error(field):
    if field not in FIELD_CASES:
        pytest.fail(f"{field} is new: give it a case, so that it is known to be read")
    base, value, observe = FIELD_CASES[field]
    name = field.split(".")[1]
    if name == "num_layers":
        base, other = BASE, dataclasses.replace(BASE, num_layers=2, layer_kinds=(0, 0))
    else:
        other = dataclasses.replace(base, **{name: value})
    if isinstance(base, Rope):
        base, other = of_kind(base), of_kind(other)
    elif isinstance(base, AttentionKind):
        base, other = (dataclasses.replace(BASE, kinds=(kind,)) for kind in (base, other))
    before, after = observe(base), observe(other)
    if observe is logits:
        assert np.abs(before - after).max() > 1e-4
    else:
        assert before != after


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("activation", sorted(set(ACTIVATIONS.values()))),
        ("norm", ["rms", "rms_plus_one", "layer"]),
        ("norm_placement", ["before", "after", "both"]),
        ("qk_norm", ["none", "head", "full"]),
    ],
)
def test_each_choice_is_another_function(field, values):
    outputs = [logits(dataclasses.replace(BASE, **{field: value})) for value in values]
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-4 for other in outputs[:i])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_from_the_shapes(bias, gated, tied):
    config = dataclasses.replace(
        BASE, qkv_bias=bias, mlp_bias=bias, gated_mlp=gated, tied_embeddings=tied
    )
    D, F, N, K, H, V, L = 20, 23, 4, 2, 6, 31, 3
    layer = 2 * D * (N + K) * H + (2 + gated) * D * F + 2 * D
    layer += bias * ((N + 2 * K) * H + (1 + gated) * F + D)
    assert num_parameters(config) == V * D * (2 - tied) + L * layer + D
    assert num_parameters(config) == sum(map(math.prod, weight_shapes(config).values()))


def test_a_kind_for_each_layer_equals_one_kind_for_all():
    """Layers that choose among kinds compute the same as layers of the only kind."""
    twice = dataclasses.replace(BASE, kinds=(BASE.kinds[0], AttentionKind(Rope(500.0), 99)))
    np.testing.assert_array_equal(
        logits(dataclasses.replace(twice, layer_kinds=(0, 1, 0))), logits(BASE)
    )


def test_a_layer_without_rope_among_others_turns_nothing():
    mixed = dataclasses.replace(
        BASE, kinds=(AttentionKind(None), AttentionKind(Rope(500.0))), layer_kinds=(0, 0, 0)
    )
    np.testing.assert_array_equal(logits(mixed), logits(of_kind(None)))


def test_a_window_sees_so_many_tokens_and_no_more():
    """With one layer, a token's change reaches window - 1 tokens further, and not one beyond."""
    config = dataclasses.replace(of_kind(Rope(500.0), 4), num_layers=1, layer_kinds=(0,))
    graphdef, abstract = abstract_decoder(config, jnp.float32)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), abstract)
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)

    def outputs(tokens):
        return nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(tokens, positions)[0]

    change = np.abs(outputs(positions) - outputs(positions.at[2].set(29))).max(axis=1)
    assert (np.flatnonzero(change) == [2, 3, 4, 5]).all()


@pytest.mark.parametrize("num_tokens", [5, 7, 8, 11])
def test_longrope_goes_by_the_tokens_and_not_by_the_padding(num_tokens):
    config = of_kind(LONG)
    factors = LONG.long_factors if num_tokens > 7 else LONG.short_factors
    fixed = of_kind(dataclasses.replace(LONG, short_factors=factors, long_factors=factors))
    graphdef, abstract = abstract_decoder(config, jnp.float32)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), abstract)
    tokens = jnp.arange(NUM_TOKENS, dtype=jnp.int32)

    def outputs(graphdef, count):
        model = nnx.merge(graphdef, state)
        return nnx.capture(model, nnx.Intermediate)(tokens, tokens, count)[0]

    expected = outputs(abstract_decoder(fixed, jnp.float32)[0], None)
    np.testing.assert_array_equal(outputs(graphdef, jnp.int32(num_tokens)), expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_kv_heads": 3}, "4 query heads do not divide over 3 kv heads"),
        ({"head_size": 5}, "head size 5 is odd"),
        ({"width": 0}, "width is 0, not a positive count"),
        ({"layer_kinds": (0, 0)}, "2 layer kinds for 3 layers"),
        (
            {"kinds": (AttentionKind(Rope(9.0, rotated_fraction=0.5)),)},
            "rotated part 3 of the head",
        ),
        ({"kinds": (AttentionKind(LONG),), "head_size": 8}, "3 rope factors for 4 rotary pairs"),
    ],
)
def test_sizes_that_no_decoder_has_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(BASE, **changes)


def test_an_odd_head_is_no_trouble_where_nothing_is_rotated():
    assert logits(dataclasses.replace(of_kind(None), head_size=5)).shape == (NUM_TOKENS, 31)


def test_an_x64_trace_leaves_the_switch_alone():
    with jax.enable_x64(True):
        shapes = weight_shapes(BASE)
    assert shapes == weight_shapes(BASE) and not jax.config.jax_enable_x64


def test_linear_rope_divides_the_positions():
    plain = Rope(500.0).cos_sin(7, 6, np.dtype(np.float64))
    stretched = Rope(500.0, "linear", 3.0).cos_sin(19, 6, np.dtype(np.float64))
    np.testing.assert_allclose(stretched[:, ::3], plain, rtol=0, atol=1e-13)
