"""Spectra: one gradient's factors or matrix -> numbers, by the names of their columns.

`target` (the device that is traced for) -> `linalg`, `products` (matrix functions) -> `algorithms`,
`block_jacobi` (singular values of D^T X) -> `statistics` (numbers from singular values and entries);
`similarity` (cosines between gradients).
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
    with_jacobi_values,
)
from jaxgrad.spectra.target import compiled_for, target

__all__ = [
    "FINITE_FLAGS",
    "Algorithm",
    "Columns",
    "LayerFactors",
    "ScaledMatrix",
    "choose_algorithm",
    "compiled_for",
    "extremes_of_factors",
    "extremes_of_matrix",
    "matrix_similarities",
    "prepare_factors",
    "prepare_matrix",
    "similarities",
    "spectra_of_factors",
    "spectra_of_matrix",
    "target",
    "with_jacobi_values",
]
