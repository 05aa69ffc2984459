"""Reduction inside the backward pass: one layer's factors at a time, where all of them do not fit.

The forward pass keeps each layer's input, [L, T, D], and nothing else. The backward pass goes from the
last layer to the first: it computes the layer again, reduces its factors to numbers and drops them. That
costs one more forward pass, and needs memory for one layer's factors instead of all.

The numbers are those of `one_device.measure_example` up to rounding. Similarities need the factors of all
layers at once, and method `dense` all matrices: neither works this way.
"""

import dataclasses

import jax
from flax import nnx

from jaxgrad.data.batches import ExampleArrays
from jaxgrad.gradients.factors import Factors, num_live_tokens, value_at, zeros_at
from jaxgrad.gradients.loss import LOSSES, Head
from jaxgrad.gradients.selection import one_of_each
from jaxgrad.measure.reducers import can_be_layerwise
from jaxgrad.measure.reduction import Measured, reduce_factors, take_layers
from jaxgrad.models.attention import AttentionTables
from jaxgrad.models.decoder import PROJECTIONS, Decoder, Layer
from jaxgrad.options import MeasureSettings
from jaxgrad.projections import HEAD


def measure_layerwise(
    graphdef: nnx.GraphDef, state: nnx.State, example: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, Measured]:
    """Loss of one example, and for each projection the columns of its selected layers [L, ...].

    Raises:
        ValueError: with `similarity` or method "dense".
    """
    if not can_be_layerwise(settings):
        raise ValueError("similarity and dense need all layers at once")
    selection = settings.selection
    stacked = tuple(name for name in selection.names if PROJECTIONS[name].stacked)
    model = nnx.merge(graphdef, state, copy=True)
    layer_def, layer_states = nnx.split(model.layers)
    x_TD = model.embed(example.tokens_T)
    tables, traits_L = model.tables(x_TD, num_live_tokens(example))

    def forward(x_TD: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
        weights, traits = layer
        # Captured and dropped: Flax runs a layer that sows only inside a capture.
        run = nnx.capture(nnx.merge(layer_def, weights, copy=True), nnx.Intermediate)
        return run(x_TD, tables(traits))[0], x_TD

    x_TD, inputs_LTD = jax.lax.scan(forward, x_TD, (layer_states, traits_L))
    loss, by_output_TD, head = _head(graphdef, state, x_TD, example, settings)

    def backward(by_output_TD: jax.Array, layer: tuple) -> tuple[jax.Array, Measured]:
        weights, traits, x_TD = layer
        by_input_TD, factors = _layer_factors(
            layer_def, weights, x_TD, by_output_TD, tables(traits), stacked
        )
        of_layer = dataclasses.replace(settings, selection=one_of_each(stacked))
        found = reduce_factors(factors, of_layer)
        return by_input_TD, jax.tree.map(lambda array: array[0], found)

    found: Measured = {}
    if stacked:
        _, found = jax.lax.scan(
            backward, by_output_TD, (layer_states, traits_L, inputs_LTD), reverse=True
        )
    chosen = {
        name: jax.tree.map(lambda array_L, name=name: take_layers(array_L, selection[name]), values)
        for name, values in found.items()
    }
    return loss, {name: (chosen | head)[name] for name in selection.names}


def _head(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x_TD: jax.Array,
    example: ExampleArrays,
    settings: MeasureSettings,
) -> tuple[jax.Array, jax.Array, Measured]:
    """Loss, its derivative by the last layer's output, and `lm_head`'s columns if selected."""
    names = settings.selection.names
    site = PROJECTIONS[HEAD]
    output = (*site.module, "output")
    is_measured = HEAD in names
    take_loss = LOSSES[settings.loss].function

    def run(x_TD: jax.Array, taps: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, state, copy=True)

        def top(model: Decoder) -> jax.Array:
            x_SD = model.at_positions(x_TD, example.positions_S)
            return take_loss(Head(model.logits, is_measured), x_SD, example)

        return nnx.capture(top, nnx.Intermediate, init=taps)(model)

    def shapes(x_TD: jax.Array) -> nnx.State:
        model = nnx.merge(graphdef, state, copy=True)
        top = nnx.capture(
            lambda model: model.logits(model.at_positions(x_TD, example.positions_S)),
            nnx.Perturbation,
        )
        return top(model)[1]

    taps = zeros_at(jax.eval_shape(shapes, x_TD), {output}) if is_measured else nnx.State({})
    differentiate = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (loss, captured), (by_output_TD, by_tap) = differentiate(x_TD, taps)
    if not is_measured:
        return loss, by_output_TD, {}
    factors = Factors(value_at(captured, site.input)[None], value_at(by_tap, output)[None])
    of_head = dataclasses.replace(settings, selection=one_of_each((HEAD,)))
    return loss, by_output_TD, reduce_factors({HEAD: factors}, of_head)


def _layer_factors(
    layer_def: nnx.GraphDef,
    weights: nnx.State,
    x_TD: jax.Array,
    by_output_TD: jax.Array,
    tables: AttentionTables,
    names: tuple[str, ...],
) -> tuple[jax.Array, dict[str, Factors]]:
    """The derivative by one layer's input, and the factors [1, T, ...] of its projections."""

    def shapes(x_TD: jax.Array) -> nnx.State:
        layer: Layer = nnx.merge(layer_def, weights, copy=True)
        return nnx.capture(layer, nnx.Perturbation)(x_TD, tables)[1]

    # Inside the layer a path begins behind "layers".
    outputs = {name: (*PROJECTIONS[name].module[1:], "output") for name in names}
    taps = zeros_at(jax.eval_shape(shapes, x_TD), set(outputs.values()))

    def run(x_TD: jax.Array, taps: nnx.State) -> tuple[jax.Array, nnx.State]:
        layer: Layer = nnx.merge(layer_def, weights, copy=True)
        return nnx.capture(layer, nnx.Intermediate, init=taps)(x_TD, tables)

    _, differentiate, captured = jax.vjp(run, x_TD, taps, has_aux=True)
    by_input_TD, by_tap = differentiate(by_output_TD)
    factors = {
        name: Factors(
            value_at(captured, PROJECTIONS[name].input[1:])[None],
            value_at(by_tap, outputs[name])[None],
        )
        for name in names
    }
    return by_input_TD, factors
