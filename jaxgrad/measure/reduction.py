"""From one example's factors to columns: which projections share a factorization, and over which layers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxgrad.gradients.factors import Factors
from jaxgrad.gradients.selection import Selection
from jaxgrad.measure.reducers import all_layers_reducers, layer_reducers, without_unwanted
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.options import MeasureSettings
from jaxgrad.spectra import (
    Algorithm,
    Columns,
    choose_algorithm,
    prepare_factors,
    prepare_matrix,
    target,
    with_jacobi_values,
)

# Projection -> column -> array [L, ...] of its selected layers (of a batch [B, L, ...]); besides the
# columns, `FINITE_FLAGS`.
Measured = dict[str, Columns]
# An input X and, projection -> D, the output gradients that go with it.
Group = tuple[jax.Array, dict[str, jax.Array]]


def reduce_factors(factors: dict[str, Factors], settings: MeasureSettings) -> Measured:
    """Columns of the selected layers of every selected projection, by the reducers of single layers."""
    found: Measured = {}
    for groups in groups_at_once(settings):
        layers = settings.selection[groups[0][0]]
        chosen = jax.tree.map(
            lambda array_L, layers=layers: take_layers(array_L, layers), paired(factors, groups)
        )
        found |= reduce_groups(chosen, settings)
    return found


def groups_at_once(settings: MeasureSettings) -> list[list[tuple[str, ...]]]:
    """The `shared_inputs` that are reduced by one call: on a TPU, which compiles slowly, all of a layer."""
    inputs = shared_inputs(settings.selection)
    if settings.backend != "tpu":
        return [[names] for names in inputs]
    together: dict[tuple[bool, tuple[int, ...]], list[tuple[str, ...]]] = {}
    for names in inputs:
        key = (PROJECTIONS[names[0]].stacked, settings.selection[names[0]])
        together.setdefault(key, []).append(names)
    return list(together.values())


def paired(factors: dict[str, Factors], groups: list[tuple[str, ...]]) -> list[Group]:
    """The factors of groups of projections with one input each, the input once."""
    return [
        (factors[names[0]].input_LTI, {name: factors[name].output_grad_LTO for name in names})
        for names in groups
    ]


def shared_inputs(selection: Selection) -> list[tuple[str, ...]]:
    """Projections that share an input and the layers that are wanted of it."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for name in selection.names:
        groups.setdefault((PROJECTIONS[name].input, selection[name]), []).append(name)
    return [tuple(names) for names in groups.values()]


def reduce_groups(groups: list[Group], settings: MeasureSettings) -> Measured:
    """Columns of all layers given, of inputs [L, T, I] and their projections' D [L, T, O]."""

    def reduce_layer(groups: list[Group]) -> Measured:
        prepared = [
            prepare_factors(input_TI, grads, _algorithms(input_TI, grads, settings))
            for input_TI, grads in groups
        ]
        found: Measured = {}
        for factors in with_jacobi_values(prepared):
            parts = [reducer.of_factors(factors) for reducer in layer_reducers(settings)]
            found |= {
                name: without_unwanted(merged(part[name] for part in parts), settings)
                | factors.finite_flags[name]
                for name in factors.grads
            }
        return found

    return over_layers(reduce_layer, groups)


def _algorithms(
    input_TI: jax.Array, grads: dict[str, jax.Array], settings: MeasureSettings
) -> dict[str, Algorithm]:
    return {
        name: choose_algorithm(
            grad_TO.shape[0],
            grad_TO.shape[1],
            input_TI.shape[1],
            backend=settings.backend,
            method=settings.method,
            is_float64=grad_TO.dtype == jax.numpy.float64,
        )
        for name, grad_TO in grads.items()
    }


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
    if target() == "cpu":
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
