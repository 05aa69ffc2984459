"""Numbers of mean curves: MAD over all layers and by segment, RD and its largest layers.

A mean curve is a statistic of one projection averaged over examples, as a function of the layer.
Source of the definitions: Li, Li & Zhou, ACL 2025 (arXiv 2410.23743).

Every function but `mean_absolute_difference` takes `curve_LP`, one curve for each projection. More axes may
come before these (resamples), so the same code makes the estimate and its bootstrap distribution.
"""

import math
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxgrad.errors import UserError

SEGMENTS = ("early", "middle", "last")

# The authors' table: number of layers -> first layer of the middle and of the last segment.
_AUTHORS_BOUNDARIES = {26: (7, 20), 28: (7, 21), 32: (10, 20), 42: (12, 30)}


class Segment(NamedTuple):
    """Layers first .. last, both included."""

    first: int
    last: int


def segments(num_layers: int) -> tuple[Segment, Segment, Segment]:
    """The early, middle and last layers of a model.

    The authors give them for four depths. One rule makes them for every depth. A boundary stands at a
    fraction of the depth. At the authors' depths the fraction is theirs; between two of these it is
    interpolated linearly; below 26 and above 42 it is that of the nearest. The product is rounded half up
    in exact arithmetic, so that the authors' own depths give the authors' table.

    A simpler rule cannot reproduce the table. The middle begins at 7, 7, 10, 12 for N = 26, 28, 32, 42:
    floor(a N + c) would need 4 a > 2 (from 28 to 32) and 10 a < 3 (from 32 to 42). Quarters, as for
    N = 28, give 26 but not 32 or 42.

    | N | early | middle | last | from |
    |---|---|---|---|---|
    | 3 | 0-0 | 1-1 | 2-2 | fractions of 26; a segment of one layer has no step: its MAD is NaN |
    | 18 | 0-4 | 5-13 | 14-17 | fractions of 26 |
    | 28 | 0-6 | 7-20 | 21-27 | the authors |
    | 30 | 0-7 | 8-20 | 21-29 | between 28 and 32 |
    | 84 | 0-23 | 24-59 | 60-83 | fractions of 42 |

    Raises:
        UserError: fewer than three layers: there are no three segments.
    """
    if num_layers < len(SEGMENTS):
        raise UserError(
            f"A model of {num_layers} layers has no early, middle and last segment: "
            "use MAD over all its layers."
        )
    middle, last = (_boundary(num_layers, which) for which in (0, 1))
    return Segment(0, middle - 1), Segment(middle, last - 1), Segment(last, num_layers - 1)


def _boundary(num_layers: int, which: int) -> int:
    depths = sorted(_AUTHORS_BOUNDARIES)
    depth = min(max(num_layers, depths[0]), depths[-1])
    below = max(known for known in depths if known <= depth)
    above = min(known for known in depths if known >= depth)
    fractions = [Fraction(_AUTHORS_BOUNDARIES[n][which], n) for n in (below, above)]
    weight = Fraction(depth - below, above - below) if above > below else Fraction(0)
    fraction = fractions[0] + weight * (fractions[1] - fractions[0])
    return math.floor(num_layers * fraction + Fraction(1, 2))


def mean_absolute_difference(curve: np.ndarray) -> float:
    """MAD of a mean curve [N]: mean of |step| from each layer to the next; NaN for a single layer."""
    steps = np.abs(np.diff(np.asarray(curve, np.float64)))
    return float(steps.mean()) if steps.size else float("nan")


def mad(curve_LP: np.ndarray) -> np.ndarray:
    """MAD over all layers: 1/(N-1) sum_i |s_(i+1) - s_i|.

    Args:
        curve_LP: mean curves [..., L, P].

    Returns:
        [..., P], in the curve's unit; NaN for a single layer, and where a value of the curve is NaN.
    """
    return _mean_step(np.abs(np.diff(curve_LP, axis=-2)))


def segment_mad(curve_LP: np.ndarray) -> np.ndarray:
    """MAD of the early, middle and last layers; a step across a boundary belongs to none of them.

    Args:
        curve_LP: mean curves [..., L, P] of all layers of the model.

    Returns:
        [..., 3, P]; NaN for a segment of a single layer.

    Raises:
        UserError: fewer than three layers.
    """
    step = np.abs(np.diff(curve_LP, axis=-2))
    # Step i goes from layer i to i + 1: a segment's steps are first .. last - 1.
    means = [_mean_step(step[..., s.first : s.last, :]) for s in segments(curve_LP.shape[-2])]
    return np.stack(means, axis=-2)


def _mean_step(step_SP: np.ndarray) -> np.ndarray:
    if step_SP.shape[-2] == 0:
        return np.full((*step_SP.shape[:-2], step_SP.shape[-1]), np.nan)
    return step_SP.mean(axis=-2)


def relative_difference(reference_LP: np.ndarray, other_LP: np.ndarray) -> np.ndarray:
    """RD, signed: (s2 - s1) / s1 per layer, 1 = the reference set.

    Returns:
        [..., L, P], no unit; NaN where the reference is zero.
    """
    zero = reference_LP == 0
    return np.where(zero, np.nan, (other_LP - reference_LP) / np.where(zero, 1.0, reference_LP))


def mean_absolute_rd(reference_LP: np.ndarray, other_LP: np.ndarray) -> np.ndarray:
    """RD, absolute, averaged over layers: [..., P]; NaN where a layer has no RD."""
    return np.abs(relative_difference(reference_LP, other_LP)).mean(axis=-2)


def largest_layers(rd_LP: np.ndarray, count: int = 5) -> np.ndarray:
    """Positions of the layers with the largest |RD| of each projection.

    Args:
        rd_LP: signed RD [L, P].
        count: how many; all layers where there are fewer.

    Returns:
        int64 [min(count, L), P], largest first. Of equal ones the lower layer comes first; NaN is last.
    """
    size_LP = np.where(np.isnan(rd_LP), -1.0, np.abs(rd_LP))
    return np.argsort(-size_LP, axis=0, kind="stable")[:count]


def has_every_layer(layers: tuple[int, ...], num_layers: int | None) -> bool:
    """Whether these are all layers 0 .. N-1, so that MAD is defined; N is None where it is unknown."""
    contiguous = layers[0] == 0 and all(b == a + 1 for a, b in pairwise(layers))
    return contiguous and num_layers in (None, len(layers))
