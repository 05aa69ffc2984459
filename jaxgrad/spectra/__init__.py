"""Spectra: factors or matrices of one gradient -> numbers by the names of their columns.

`linalg` (factorizations that are safe where they run) -> `algorithms` (singular values of D^T X, and
which way to take them) -> `statistics` (numbers from singular values, and the entries' statistics);
`similarity` (cosines between gradients, by tiles).
"""

from jaxgrad.spectra.algorithms import Algorithm, choose_algorithm
from jaxgrad.spectra.similarity import matrix_similarities, similarities
from jaxgrad.spectra.statistics import (
    FINITE_FLAGS,
    Columns,
    LayerFactors,
    ScaledMatrix,
    extremes_of_factors,
    extremes_of_matrix,
    prepare_factors,
    prepare_matrix,
    spectra_of_factors,
    spectra_of_matrix,
)

__all__ = [
    "FINITE_FLAGS",
    "Algorithm",
    "Columns",
    "LayerFactors",
    "ScaledMatrix",
    "choose_algorithm",
    "extremes_of_factors",
    "extremes_of_matrix",
    "matrix_similarities",
    "prepare_factors",
    "prepare_matrix",
    "similarities",
    "spectra_of_factors",
    "spectra_of_matrix",
]
