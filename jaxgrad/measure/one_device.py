"""One jitted function: a batch of examples -> losses and columns of every selected gradient.

The unit is one example's gradient and its reduction to numbers; `jax.vmap` makes it a batch, so no
gradient matrix, and no factor, is ever an output.
"""

import functools

import jax
from flax import nnx

from jaxgrad.data.batches import ExampleArrays
from jaxgrad.gradients.factors import example_gradients
from jaxgrad.measure.layerwise import measure_layerwise
from jaxgrad.measure.reduction import (
    Measured,
    reduce_all_layers,
    reduce_factors,
    reduce_matrices,
    take_factors,
    take_layers,
    with_columns,
)
from jaxgrad.options import MeasureSettings
from jaxgrad.spectra import compiled_for


def measure_example(
    graphdef: nnx.GraphDef, state: nnx.State, example: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, Measured]:
    """Loss of one example, and for each projection the columns of its selected layers [L, ...]."""
    selection = settings.selection
    if settings.layerwise:
        return measure_layerwise(graphdef, state, example, settings)
    is_dense = settings.method == "dense"
    loss, factors, matrices = example_gradients(
        graphdef, state, example, selection.names, loss=settings.loss, matrices=is_dense
    )
    if is_dense:
        found = {
            name: reduce_matrices(
                take_layers(matrix, selection[name]),
                take_factors(factors[name], selection[name]),
                settings,
            )
            for name, matrix in matrices.items()
        }
    else:
        found = reduce_factors(factors, settings)
    return loss, with_columns(found, reduce_all_layers(factors, matrices, settings))


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def measure_batch(
    graphdef: nnx.GraphDef, state: nnx.State, batch: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, Measured]:
    """`measure_example` over a batch: loss [B], columns [B, L, ...]."""
    with jax.default_matmul_precision(settings.precision), compiled_for(settings.backend):
        return jax.vmap(lambda example: measure_example(graphdef, state, example, settings))(batch)
