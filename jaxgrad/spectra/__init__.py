"""Spectra: factors or matrices of one gradient -> its singular-value statistics, jitted.

`linalg` (factorizations that are safe where they run) -> `algorithms` (singular values of D^T X, and
which way to take them) -> `statistics` (numbers from singular values, and the entries' statistics);
`similarity` (cosines between gradients, by tiles).
"""

from jaxgrad.spectra.algorithms import Algorithm, choose_algorithm
from jaxgrad.spectra.similarity import Similarities, matrix_similarities, similarities
from jaxgrad.spectra.statistics import (
    Statistics,
    matrix_statistics,
    shared_input_statistics,
)

__all__ = [
    "Algorithm",
    "Similarities",
    "Statistics",
    "choose_algorithm",
    "matrix_similarities",
    "matrix_statistics",
    "shared_input_statistics",
    "similarities",
]
