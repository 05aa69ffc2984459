"""Reduction inside the backward pass gives the numbers of the reduction behind it, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from soak import CONFIG

from jaxgrad import AnalyzeOptions, UserError
from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.memory import predict_memory
from jaxgrad.measure.programs import Programs
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.options import MeasureSettings
from jaxgrad.runs import plan as planning
from jaxgrad.spectra import FINITE_FLAGS

DEEP = dataclasses.replace(CONFIG, layer_kinds=(0,) * 6, num_layers=6)


def random_state(config):
    rng = np.random.default_rng(0)
    _, abstract = abstract_decoder(config, jnp.float32)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 8, jnp.float32), abstract
    )


def random_arrays(shape, used):
    rng = np.random.default_rng(1)
    B, T, S = shape.num_examples, shape.num_tokens, shape.num_responses
    weights_BS = np.zeros((B, S), np.float64)
    for row, count in zip(weights_BS, used, strict=True):
        row[:count] = 1 / count
    return ExampleArrays(
        rng.integers(0, CONFIG.vocab_size, (B, T), np.int32),
        np.tile(np.arange(S, dtype=np.int32) + T - S - 1, (B, 1)),
        rng.integers(0, CONFIG.vocab_size, (B, S), np.int32),
        weights_BS,
    )


def measured(config, selection, layerwise, shape, used):
    settings = MeasureSettings(
        select_parameters(config, selection), spectrum=True, extremes=True, layerwise=layerwise
    )
    programs = Programs(config, "float32", settings)
    return programs.measure(random_state(config), shape, random_arrays(shape, used))


@pytest.mark.parametrize(
    ("selection", "num_responses", "used"),
    [("all", 16, (9, 16)), ("attention", 80, (71, 5)), (r"layers\.1\.|lm_head", 16, (3, 4))],
)
def test_the_numbers_of_the_reduction_behind_the_backward_pass(selection, num_responses, used):
    """The same operations on the same factors: only fusion may round otherwise."""
    shape = BatchShape(2, 88, num_responses)
    loss, stacked = measured(CONFIG, selection, False, shape, used)
    layerwise_loss, layerwise = measured(CONFIG, selection, True, shape, used)
    np.testing.assert_allclose(layerwise_loss, loss, rtol=1e-6)
    assert list(layerwise) == list(stacked)
    for name, expected in stacked.items():
        assert np.all(expected["nuclear_norm"] > 0)
        assert layerwise[name].keys() == expected.keys()
        for field in expected.keys() - {"singular_values", *FINITE_FLAGS}:
            got, want = layerwise[name][field], expected[field]
            if field == "condition_number":  # beyond this it is the rounding of the smallest value
                got, want = (np.minimum(numbers, 1e5) for numbers in (got, want))
            assert got.shape == want.shape and got.dtype == want.dtype
            # The smallest values are noise of the largest.
            atol = 1e-6 * expected["sigma_max"].max() if field.startswith(("entry", "sigma")) else 0
            rtol = 1e-2 if field == "condition_number" else 1e-5
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=f"{name} {field}")
        np.testing.assert_allclose(
            layerwise[name]["singular_values"],
            expected["singular_values"],
            rtol=1e-4,
            atol=1e-6 * expected["sigma_max"].max(),
        )


def test_it_takes_less_memory_and_the_prediction_knows(shipped_compiler):
    shape = BatchShape(2, 128, 16)
    work, predicted = {}, {}
    for layerwise in (False, True):
        settings = MeasureSettings(select_parameters(DEEP, "attention"), layerwise=layerwise)
        work[layerwise] = Programs(DEEP, "float32", settings).memory(shape).work_space
        predicted[layerwise] = predict_memory(DEEP, "float32", settings, shape).work_space
    assert work[True] < 0.6 * work[False]
    for layerwise, found in work.items():
        assert predicted[layerwise] == pytest.approx(found, rel=0.2), layerwise


@pytest.mark.parametrize("asked", [{"similarity": True}, {"method": "dense"}])
def test_what_needs_all_layers_is_refused(asked):
    options = AnalyzeOptions(layerwise="yes", **asked)
    with pytest.raises(UserError, match="need all layers at once"):
        planning.settings_for(options, CONFIG)


def test_it_is_chosen_where_all_factors_do_not_fit_and_may_be(monkeypatch):
    def settled(at_hand, **asked):
        monkeypatch.setattr(planning, "memory_at_hand", lambda: at_hand)
        options = AnalyzeOptions(**asked)
        settings = planning.settings_for(options, DEEP)
        options, _, choice = planning.fit_batches(options, settings, DEEP, ())
        return options.layerwise, choice.needed

    _, needed = settled(10**12)
    assert settled(10**12)[0] == "no"
    assert settled(needed // 2)[0] == "yes"
    assert settled(needed // 2, similarity=True)[0] == "no"
    assert settled(needed // 2, layerwise="no")[0] == "no"
    assert settled(10**12, layerwise="yes")[0] == "yes"
