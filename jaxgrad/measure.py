"""One jitted function: a batch of examples -> losses and statistics of every selected gradient.

The unit is one example's gradient and its reduction to numbers; `jax.vmap` makes it a batch, so no
gradient matrix, and no factor, is ever an output.
"""

import functools

import jax
from flax import nnx

from jaxgrad.gradients import ExampleArrays, Factors, Selection, example_gradients
from jaxgrad.layerwise import measure_layerwise
from jaxgrad.reduction import MeasureSettings, reduce_factors, reduce_matrices, take_layers
from jaxgrad.spectra import Similarities, Statistics, matrix_similarities, similarities


def measure_example(
    graphdef: nnx.GraphDef, state: nnx.State, example: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, dict[str, Statistics]]:
    """Loss of one example, and for each projection the statistics of its selected layers [L, ...]."""
    selection = settings.selection
    if settings.layerwise:
        loss, statistics = measure_layerwise(graphdef, state, example, settings)
        return loss, without_spectrum(statistics, settings)
    loss, factors, matrices = example_gradients(
        graphdef, state, example, selection.names, matrices=settings.method == "dense"
    )
    if settings.method == "dense":
        statistics = {
            name: reduce_matrices(
                take_layers(matrix, selection[name]),
                Factors(*(take_layers(part, selection[name]) for part in factors[name])),
                settings,
            )
            for name, matrix in matrices.items()
        }
    else:
        statistics = reduce_factors(factors, settings)
    if settings.similarity:
        statistics = with_cosines(statistics, cosines_between(factors, matrices, selection))
    return loss, without_spectrum(statistics, settings)


def without_spectrum(
    statistics: dict[str, Statistics], settings: MeasureSettings
) -> dict[str, Statistics]:
    """The statistics, their singular values left out unless these are to be kept."""
    if settings.spectrum:
        return statistics
    return {
        name: values._replace(singular_values=values.singular_values[..., :0])
        for name, values in statistics.items()
    }


def cosines_between(
    factors: dict[str, Factors], matrices: dict[str, jax.Array], selection: Selection
) -> dict[str, Similarities]:
    """Cosines between one example's gradients, from the matrices where there are any, or the factors."""
    layers = dict(selection.layers)
    if matrices:  # method dense
        return matrix_similarities(
            {name: take_layers(matrix, layers[name]) for name, matrix in matrices.items()}, layers
        )
    chosen = {
        name: (
            take_layers(pair.input_LTI, layers[name]),
            take_layers(pair.output_grad_LTO, layers[name]),
        )
        for name, pair in factors.items()
    }
    return similarities(chosen, layers)


def with_cosines(
    statistics: dict[str, Statistics], found: dict[str, Similarities]
) -> dict[str, Statistics]:
    """The statistics with the cosines in their places."""
    return {
        name: values._replace(
            partner_cosine=found[name].partner_L, layer_cosines=found[name].layers_LL
        )
        for name, values in statistics.items()
    }


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def measure_batch(
    graphdef: nnx.GraphDef, state: nnx.State, batch: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, dict[str, Statistics]]:
    """`measure_example` over a batch: loss [B], statistics [B, L, ...]."""
    with jax.default_matmul_precision(settings.precision):
        return jax.vmap(lambda example: measure_example(graphdef, state, example, settings))(batch)
