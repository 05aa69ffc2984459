"""Mean similarities of a run: between neighbouring layers, all layers, and partners in a layer."""

from dataclasses import dataclass

import numpy as np

from jaxgrad.analysis.example_set import ExampleSet
from jaxgrad.analysis.intervals import Interval
from jaxgrad.analysis.resampling import Resampling
from jaxgrad.results.read import Results

PARTNERS = (("q", "o"), ("k", "v"))


@dataclass(frozen=True)
class Similarity:
    """Cosines between flattened gradients, averaged over the examples for which all are defined.

    Attributes:
        layers: As the set's.
        projections: As the set's.
        layer_cosine_PLL: Mean cosine of layers i and j, one matrix a projection; None where the
            cosines of neighbours alone are known (the authors' files).
        adjacent_LP: Mean cosine of layers i and i + 1 [L - 1, P], percentile intervals; None where
            it was not measured.
        partner_L2: Mean cosine of q and o, of k and v [L, 2]; None where it was not measured.
        num_examples: Examples of the means.
        num_undefined: Examples with a cosine that is undefined (a zero gradient), left out.
    """

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    layer_cosine_PLL: np.ndarray | None
    adjacent_LP: Interval | None
    partner_L2: Interval | None
    num_examples: int
    num_undefined: int


def mean_similarity(
    results: Results, examples: ExampleSet, *, resampling: Resampling = Resampling()
) -> Similarity | None:
    """The similarities of a set's examples; None where none were measured.

    Args:
        results: The tables that the set was made of.
        examples: The set, whose examples, layers and projections are used.
        resampling: See there.
    """
    return None
