"""One jitted function: a batch of examples -> losses and statistics of every selected gradient.

The unit is one example's gradient and its reduction to numbers; `jax.vmap` makes it a batch, so no
gradient matrix, and no factor, is ever an output.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from jaxgrad.gradients import ExampleArrays, Factors, Selection, example_gradients
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.spectra import (
    Statistics,
    choose_algorithm,
    matrix_similarities,
    matrix_statistics,
    shared_input_statistics,
    similarities,
)

Method = Literal["auto", "factored", "dense"]


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """What is measured of an example, and how; static under jit.

    Attributes:
        method: "auto" (by factors or from the built matrix, whichever is cheaper, decided for each
            projection), "factored" (always by factors), "dense" (the weights' own gradients and SVDs).
        spectrum: keep the singular values.
        extremes: find the largest and smallest entry.
        similarity: take the cosines between the gradients of layers, and of partners in a layer.
        precision: of matrix products in the model: "highest", "high" or "default".
    """

    selection: Selection
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    similarity: bool = False
    precision: str = "highest"


def measure_example(
    graphdef: nnx.GraphDef, state: nnx.State, example: ExampleArrays, settings: MeasureSettings
) -> tuple[jax.Array, dict[str, Statistics]]:
    """Loss of one example, and for each projection the statistics of its selected layers [L, ...]."""
    selection = settings.selection
    loss, factors, matrices = example_gradients(
        graphdef, state, example, selection.names, matrices=settings.method == "dense"
    )
    if settings.method == "dense":
        reduce = functools.partial(matrix_statistics, extremes=settings.extremes)
        statistics = {
            name: _over_layers(
                lambda operands: reduce(*operands),
                (_take(matrix, selection[name]), _take(factors[name][1], selection[name])),
            )
            for name, matrix in matrices.items()
        }
    else:
        statistics = {}
        for group in _groups(selection):
            statistics |= _reduce_group(factors, group, settings)
    if settings.similarity:
        statistics = _with_similarities(statistics, factors, matrices, selection)
    if not settings.spectrum:
        statistics = {
            name: values._replace(singular_values=values.singular_values[..., :0])
            for name, values in statistics.items()
        }
    return loss, statistics


def _with_similarities(
    statistics: dict[str, Statistics],
    factors: dict[str, Factors],
    matrices: dict[str, jax.Array],
    selection: Selection,
) -> dict[str, Statistics]:
    layers = dict(selection.layers)
    if matrices:  # method dense
        found = matrix_similarities(
            {name: _take(matrix, layers[name]) for name, matrix in matrices.items()}, layers
        )
    else:
        chosen = {
            name: (_take(pair.input_LTI, layers[name]), _take(pair.output_grad_LTO, layers[name]))
            for name, pair in factors.items()
        }
        found = similarities(chosen, layers)
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


def _groups(selection: Selection) -> list[tuple[str, ...]]:
    """Projections that share an input and the layers that are wanted of it."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for name, layers in selection.layers:
        groups.setdefault((PROJECTIONS[name].input, layers), []).append(name)
    return [tuple(names) for names in groups.values()]


def _reduce_group(
    factors: dict[str, Factors], names: tuple[str, ...], settings: MeasureSettings
) -> dict[str, Statistics]:
    layers = settings.selection[names[0]]
    input_LTI = _take(factors[names[0]].input_LTI, layers)
    grads = {name: _take(factors[name].output_grad_LTO, layers) for name in names}
    num_tokens, num_in = input_LTI.shape[1:]
    algorithms = {
        name: choose_algorithm(
            num_tokens,
            grad_LTO.shape[-1],
            num_in,
            backend=jax.default_backend(),
            method=settings.method,
            is_float64=grad_LTO.dtype == jax.numpy.float64,
        )
        for name, grad_LTO in grads.items()
    }
    return _over_layers(
        lambda operands: shared_input_statistics(
            operands[0], operands[1], algorithms, extremes=settings.extremes
        ),
        (input_LTI, grads),
    )


def _over_layers(function: Callable[[Any], Any], operands: Any) -> Any:
    """A loop over layers on the CPU, where batching gains nothing; a batch elsewhere."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, operands)
    return jax.vmap(function)(operands)


def _take(array_L: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    if layers == tuple(range(array_L.shape[0])):
        return array_L
    return array_L[jax.numpy.asarray(layers)]
