"""Reducers: what is kept of one example's gradients.

A reducer takes the factors (or, by method `dense`, the matrices) of a group of projections and gives the
columns that are declared for it in `results.columns`. Some reduce a layer by itself; one needs all layers
at once. To keep another number of a gradient: declare its column, and compute it in the reducer that has
what it needs, or add a reducer to `REDUCERS` (docs/extending.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxgrad.gradients.factors import Factors
from jaxgrad.options import MeasureSettings
from jaxgrad.results import columns
from jaxgrad.spectra import (
    Columns,
    LayerFactors,
    ScaledMatrix,
    extremes_of_factors,
    extremes_of_matrix,
    matrix_similarities,
    similarities,
    spectra_of_factors,
    spectra_of_matrix,
)


@dataclass(frozen=True)
class LayerReducer:
    """Reduces the gradients of one layer, whatever the other layers are.

    Attributes:
        columns: what it fills.
        is_wanted: whether it runs.
        of_factors: one layer's factors of projections with one input -> projection -> columns.
        of_matrix: one gradient matrix -> columns: the definition.
    """

    columns: tuple[columns.Column, ...]
    is_wanted: Callable[[MeasureSettings], bool]
    of_factors: Callable[[LayerFactors], dict[str, Columns]]
    of_matrix: Callable[[ScaledMatrix], Columns]


@dataclass(frozen=True)
class AllLayersReducer:
    """Reduces the gradients of all measured layers together.

    Attributes:
        columns: what it fills.
        is_wanted: whether it runs.
        of_factors: (projection -> factors [L, ...], projection -> its layers) -> projection -> columns.
        of_matrices: the same from the gradients [L, O, I].
    """

    columns: tuple[columns.Column, ...]
    is_wanted: Callable[[MeasureSettings], bool]
    of_factors: Callable[[dict[str, Factors], dict[str, tuple[int, ...]]], dict[str, Columns]]
    of_matrices: Callable[[dict[str, jax.Array], dict[str, tuple[int, ...]]], dict[str, Columns]]


SPECTRA = LayerReducer(
    columns.SPECTRA, lambda settings: True, spectra_of_factors, spectra_of_matrix
)
EXTREMES = LayerReducer(
    columns.EXTREMES, lambda settings: settings.extremes, extremes_of_factors, extremes_of_matrix
)
SIMILARITIES = AllLayersReducer(
    columns.SIMILARITIES, lambda settings: settings.similarity, similarities, matrix_similarities
)
REDUCERS: tuple[LayerReducer | AllLayersReducer, ...] = (SPECTRA, EXTREMES, SIMILARITIES)


def layer_reducers(settings: MeasureSettings) -> list[LayerReducer]:
    """Those that run, of the ones that take a layer by itself."""
    return [r for r in REDUCERS if isinstance(r, LayerReducer) and r.is_wanted(settings)]


def all_layers_reducers(settings: MeasureSettings) -> list[AllLayersReducer]:
    """Those that run, of the ones that take all layers together."""
    return [r for r in REDUCERS if isinstance(r, AllLayersReducer) and r.is_wanted(settings)]


def can_be_layerwise(settings: MeasureSettings) -> bool:
    """Whether a layer's factors may be dropped before the next layer's are there."""
    return settings.method != "dense" and not all_layers_reducers(settings)


def without_unwanted(found: Columns, settings: MeasureSettings) -> Columns:
    """The columns without the singular values, unless these are to be kept."""
    return {
        name: value
        for name, value in found.items()
        if settings.spectrum or name != "singular_values"
    }
