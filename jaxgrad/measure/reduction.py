"""From one example's factors to columns: which projections share a factorization, and over which layers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxgrad.gradients.factors import Factors
from jaxgrad.gradients.selection import Selection
from jaxgrad.measure.reducers import all_layers_reducers, layer_reducers, without_unwanted
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.options import MeasureSettings
from jaxgrad.spectra import Columns, choose_algorithm, prepare_factors, prepare_matrix

# Projection -> column -> array [L, ...] of its selected layers (of a batch [B, L, ...]); besides the
# columns, `FINITE_FLAGS`.
Measured = dict[str, Columns]


def reduce_factors(factors: dict[str, Factors], settings: MeasureSettings) -> Measured:
    """Columns of the selected layers of every selected projection, by the reducers of single layers."""
    found: Measured = {}
    for names in shared_inputs(settings.selection):
        layers = settings.selection[names[0]]
        input_LTI = take_layers(factors[names[0]].input_LTI, layers)
        grads = {name: take_layers(factors[name].output_grad_LTO, layers) for name in names}
        found |= reduce_shared_input(input_LTI, grads, settings)
    return found


def shared_inputs(selection: Selection) -> list[tuple[str, ...]]:
    """Projections that share an input and the layers that are wanted of it."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for name in selection.names:
        groups.setdefault((PROJECTIONS[name].input, selection[name]), []).append(name)
    return [tuple(names) for names in groups.values()]


def reduce_shared_input(
    input_LTI: jax.Array, grads: dict[str, jax.Array], settings: MeasureSettings
) -> Measured:
    """Columns of all layers given, of projections D [L, T, O] that share the input X."""
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

    def reduce_layer(operands: tuple[jax.Array, dict[str, jax.Array]]) -> Measured:
        factors = prepare_factors(*operands, algorithms)
        parts = [reducer.of_factors(factors) for reducer in layer_reducers(settings)]
        return {
            name: without_unwanted(merged(part[name] for part in parts), settings)
            | factors.finite_flags[name]
            for name in factors.grads
        }

    return over_layers(reduce_layer, (input_LTI, grads))


def reduce_matrices(matrix_LOI: jax.Array, factors: Factors, settings: MeasureSettings) -> Columns:
    """The same of one projection's gradients themselves, by the definition (method `dense`)."""

    def reduce_layer(operands: tuple[jax.Array, jax.Array, jax.Array]) -> Columns:
        matrix, finite_flags = prepare_matrix(*operands)
        found = merged(reducer.of_matrix(matrix) for reducer in layer_reducers(settings))
        return without_unwanted(found, settings) | finite_flags

    return over_layers(reduce_layer, (matrix_LOI, *factors))


def reduce_all_layers(
    factors: dict[str, Factors], matrices: dict[str, jax.Array], settings: MeasureSettings
) -> Measured:
    """Columns by the reducers that need all layers at once.

    Args:
        factors: projection -> factors of all layers.
        matrices: projection -> gradients of all layers; empty unless the method is `dense`.
        settings: what is measured.
    """
    selection = settings.selection
    layers = {name: selection[name] for name in selection.names}
    found: Measured = {name: {} for name in selection.names}
    for reducer in all_layers_reducers(settings):
        if matrices:
            chosen = {name: take_layers(matrix, layers[name]) for name, matrix in matrices.items()}
            parts = reducer.of_matrices(chosen, layers)
        else:
            pairs = {name: take_factors(pair, layers[name]) for name, pair in factors.items()}
            parts = reducer.of_factors(pairs, layers)
        found = with_columns(found, parts)
    return found


def with_columns(found: Measured, more: Mapping[str, Columns]) -> Measured:
    """Two sets of columns of the same projections as one."""
    return {name: columns | more[name] for name, columns in found.items()}


def merged(parts: Any) -> Columns:
    """Columns of several reducers as one dictionary."""
    return {name: value for part in parts for name, value in part.items()}


def over_layers(function: Callable[[Any], Any], operands: Any) -> Any:
    """A loop over layers on the CPU, where batching gains nothing; a batch elsewhere."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, operands)
    return jax.vmap(function)(operands)


def take_factors(factors: Factors, layers: tuple[int, ...]) -> Factors:
    """The factors of these layers of all."""
    return Factors(*(take_layers(part, layers) for part in factors))


def take_layers(array_L: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """These layers of all, along the first axis."""
    if layers == tuple(range(array_L.shape[0])):
        return array_L
    return array_L[jax.numpy.asarray(layers)]
