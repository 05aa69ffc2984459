"""Mean similarities of a run: between neighbouring layers, all layers, and partners in a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from jaxgrad.analysis.addresses import within_layer
from jaxgrad.analysis.example_set import ExampleSet
from jaxgrad.analysis.intervals import Interval, bootstrap
from jaxgrad.analysis.resampling import Resampling
from jaxgrad.errors import UserError
from jaxgrad.projections import PARTNER_PAIRS
from jaxgrad.results.read import Results


@dataclass(frozen=True)
class Similarity:
    """Cosines between flattened gradients, averaged over the examples for which all are defined.

    Attributes:
        layers: Of the set.
        projections: Of the set.
        layer_cosine_PLL: Mean cosine of layers i and j, one matrix for each projection; NaN for a
            projection that has none. None where no projection has any.
        adjacent_LP: Mean cosine of layers i and i + 1 [L - 1, P], percentile intervals, NaN likewise. None
            where no projection has any, and for a single layer.
        partner_L2: Mean cosine of q and o, of k and v [L, 2], percentile intervals; NaN for a pair that has
            none. None where neither has any.
        num_examples: Examples in the means. With 0 the three are None.
        num_undefined: Examples that were left out: a cosine is undefined (a zero gradient) or missing.
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

    A projection or a pair counts as measured when any example has a cosine of it. An example that lacks one
    of the measured cosines, or has an undefined one, is left out of all means.

    Args:
        results: The tables that the set was made from.
        examples: The set: its examples, layers and projections are used.
        resampling: See there.

    Raises:
        UserError: A matrix does not have one cosine for each layer of the set.
    """
    layer_ELPM, partner_EL2 = _dense(results.matrices, examples)
    of_layers_P = ~np.isnan(layer_ELPM).all(axis=(0, 1, 3))
    of_pairs_2 = ~np.isnan(partner_EL2).all(axis=(0, 1))
    if not (of_layers_P.any() or of_pairs_2.any()):
        return None
    layer_ELPM, partner_EL2 = layer_ELPM[:, :, of_layers_P], partner_EL2[:, :, of_pairs_2]
    defined_E = np.isfinite(layer_ELPM).all(axis=(1, 2, 3))
    defined_E &= np.isfinite(partner_EL2).all(axis=(1, 2))
    count = int(defined_E.sum())
    matrices_PLL = adjacent = partner = None
    if count and of_layers_P.any():
        layer_ELPM = layer_ELPM[defined_E]
        size = len(examples.layers)
        matrices_PLL = np.full((len(of_layers_P), size, size), np.nan)
        matrices_PLL[of_layers_P] = layer_ELPM.mean(axis=0).transpose(1, 0, 2)
        if size > 1:
            # The diagonal comes last: [E, P, L - 1].
            next_EPL = np.diagonal(layer_ELPM, offset=1, axis1=1, axis2=3)
            adjacent = bootstrap(
                _spread(of_layers_P),
                next_EPL.transpose(0, 2, 1),
                resampling=resampling,
            )
    if count and of_pairs_2.any():
        partner = bootstrap(
            _spread(of_pairs_2),
            partner_EL2[defined_E],
            resampling=resampling,
        )
    return Similarity(
        layers=examples.layers,
        projections=examples.projections,
        layer_cosine_PLL=matrices_PLL,
        adjacent_LP=adjacent,
        partner_L2=partner,
        num_examples=count,
        num_undefined=examples.num_examples - count,
    )


def _spread(measured: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic for `bootstrap`: the mean, with NaN in the last axis where nothing was measured."""

    def statistic(mean: np.ndarray) -> np.ndarray:
        whole = np.full((*mean.shape[:-1], len(measured)), np.nan)
        whole[..., measured] = mean
        return whole

    return statistic


def _dense(matrices: pd.DataFrame, examples: ExampleSet) -> tuple[np.ndarray, np.ndarray]:
    """Cosines over layers [E, L, P, L], of partners [E, L, 2]; NaN where undefined or not measured."""
    size, projections = len(examples.layers), examples.projections
    place_E = pd.Index(examples.index_E).get_indexer(matrices["example_index"])
    # A null layer (lm_head) is in no set.
    layer = matrices["layer"].to_numpy(np.float64, na_value=np.nan)
    place_L = pd.Index(examples.layers).get_indexer(layer)
    place_P = pd.Index(projections).get_indexer(within_layer(matrices).word_of_each())
    used = (place_E >= 0) & (place_L >= 0) & (place_P >= 0)
    lists = matrices["layer_cosines"].to_numpy()[used]
    partner = matrices["partner_cosine"].to_numpy(np.float64, na_value=np.nan)[used]
    place_E, place_L, place_P = place_E[used], place_L[used], place_P[used]
    partner_ELP = np.full((examples.num_examples, size, len(projections)), np.nan)
    partner_ELP[place_E, place_L, place_P] = partner
    layer_ELPM = np.full((*partner_ELP.shape, size), np.nan)
    given = np.flatnonzero([values is not None for values in lists])
    if len(given):
        lengths = np.array([len(values) for values in lists[given]])
        if (lengths != size).any():
            row = given[np.argmax(lengths != size)]
            raise UserError(
                f"{examples.label}: example {examples.index_E[place_E[row]]} has {len(lists[row])} "
                f"cosines of layer {examples.layers[place_L[row]]} {projections[place_P[row]]}, "
                f"for {size} layers. Analyze the data again."
            )
        layer_ELPM[place_E[given], place_L[given], place_P[given]] = np.concatenate(
            lists[given]
        ).reshape(-1, size)
    partner_EL2 = np.full((examples.num_examples, size, len(PARTNER_PAIRS)), np.nan)
    for at, (one, two) in enumerate(PARTNER_PAIRS):
        if one in projections and two in projections:
            partner_EL2[:, :, at] = partner_ELP[:, :, projections.index(one)]
    return layer_ELPM, partner_EL2
