"""From one example's factors to numbers: which projections share a factorization, and over which layers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxgrad.gradients import Factors, Selection
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.spectra import (
    Statistics,
    choose_algorithm,
    matrix_statistics,
    shared_input_statistics,
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
        layerwise: reduce each layer inside the backward pass (see `layerwise`), which takes memory for
            one layer's factors and a second forward pass; not with `similarity` or "dense".
        precision: of matrix products in the model: "highest", "high" or "default".
    """

    selection: Selection
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    similarity: bool = False
    layerwise: bool = False
    precision: str = "highest"

    @property
    def can_be_layerwise(self) -> bool:
        """Whether a layer's factors may be forgotten before the next layer's are there."""
        return not self.similarity and self.method != "dense"


def reduce_factors(factors: dict[str, Factors], settings: MeasureSettings) -> dict[str, Statistics]:
    """Statistics of the selected layers [L, ...] of every selected projection."""
    statistics: dict[str, Statistics] = {}
    for names in groups_of(settings.selection):
        layers = settings.selection[names[0]]
        input_LTI = take_layers(factors[names[0]].input_LTI, layers)
        grads = {name: take_layers(factors[name].output_grad_LTO, layers) for name in names}
        statistics |= reduce_group(input_LTI, grads, settings)
    return statistics


def groups_of(selection: Selection) -> list[tuple[str, ...]]:
    """Projections that share an input and the layers that are wanted of it."""
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for name, layers in selection.layers:
        groups.setdefault((PROJECTIONS[name].input, layers), []).append(name)
    return [tuple(names) for names in groups.values()]


def reduce_group(
    input_LTI: jax.Array, grads: dict[str, jax.Array], settings: MeasureSettings
) -> dict[str, Statistics]:
    """Statistics of all layers given [L, ...] of projections D [L, T, O] that share the input X."""
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
    return over_layers(
        lambda operands: shared_input_statistics(
            operands[0], operands[1], algorithms, extremes=settings.extremes
        ),
        (input_LTI, grads),
    )


def reduce_matrices(
    matrix_LOI: jax.Array, factors: Factors, settings: MeasureSettings
) -> Statistics:
    """The same of one projection's gradients themselves, by the definition (method `dense`)."""
    return over_layers(
        lambda operands: matrix_statistics(*operands, extremes=settings.extremes),
        (matrix_LOI, *factors),
    )


def over_layers(function: Callable[[Any], Any], operands: Any) -> Any:
    """A loop over layers on the CPU, where batching gains nothing; a batch elsewhere."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, operands)
    return jax.vmap(function)(operands)


def take_layers(array_L: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """These layers of all, along the first axis."""
    if layers == tuple(range(array_L.shape[0])):
        return array_L
    return array_L[jax.numpy.asarray(layers)]
