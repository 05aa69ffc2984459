"""One set described, and two sets compared: every number with its interval, and the examples used."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from jaxgrad.analysis import curves
from jaxgrad.analysis.example_set import ExampleSet, Values
from jaxgrad.analysis.intervals import Interval, MeanDraws
from jaxgrad.analysis.pairing import Pairs, check_comparable, pair_by_instruction
from jaxgrad.analysis.resampling import Resampling, joined
from jaxgrad.analysis.separation import SignFlip, chance_smaller, sign_flip_test
from jaxgrad.errors import UserError


@dataclass(frozen=True)
class Description:
    """One set's curves.

    Attributes:
        values: The statistic of every example that is used.
        curve_LP: Mean curve; percentile intervals, layer by layer.
        mean_P: Mean over layers of the curve.
        mad_P: MAD over all layers, "debiased" interval; None where a layer is missing.
        segment_mad_3P: MAD of the early, middle and last layers; None where a layer is missing or
            the model has fewer than three.
        note: Why one of them is None, or what limits an interval; None if nothing does.
    """

    values: Values
    curve_LP: Interval
    mean_P: Interval
    mad_P: Interval | None
    segment_mad_3P: Interval | None
    note: str | None


def describe(values: Values, resampling: Resampling = Resampling()) -> Description:
    """Mean curve, its mean, MAD and segment MAD of one set, with intervals."""
    mad = segment = note = None
    draws = MeanDraws(values.value_ELP, resampling=resampling)
    if not values.examples.has_every_layer:
        note = "no MAD: not every layer of the model was measured"
    else:
        mad = draws.interval(curves.mad, "debiased")
        if len(values.examples.layers) < len(curves.SEGMENTS):
            note = "no segments: fewer than three layers"
        else:
            segment = draws.interval(curves.segment_mad, "debiased")
    for name, of in (("MAD", mad), ("MAD by segment", segment)):
        if of is not None and of.note is not None:
            note = joined(note, f"{name}: {of.note}")
    curve, mean = draws.interval(_identity), draws.interval(_over_layers)
    return Description(values, curve, mean, mad, segment, note)


@dataclass(frozen=True)
class Contrast:
    """Two sets compared by one statistic; the first is the reference.

    Attributes:
        first, second: The values that are compared.
        pairs: Examples that belong together.
        difference_P: Mean of the second minus mean of the first, each over layers and examples.
        ratio_P: Mean of the second over mean of the first; NaN where the first's is zero.
        rd_LP: RD, signed, by layer.
        mean_absolute_rd_P: RD, absolute, averaged over layers; "debiased" interval.
        mad_difference_P: MAD of the second minus MAD of the first, see `MeanDraws.difference`; None
            where a layer is missing.
        largest: Positions in `first.examples.layers` of the five largest |RD|, [5, P].
        sign_flip: p of the paired differences of the examples' means over layers.
        chance_smaller_P: AUC of the examples' means over layers.
        note: What was not compared, what is missing, or what limits an interval; None if nothing does.
    """

    first: Values
    second: Values
    pairs: Pairs
    difference_P: Interval
    ratio_P: Interval
    rd_LP: Interval
    mean_absolute_rd_P: Interval
    mad_difference_P: Interval | None
    largest: np.ndarray
    sign_flip: SignFlip
    chance_smaller_P: Interval
    note: str | None

    def counts(self) -> pd.DataFrame:
        """Examples used, paired, truncated and left out, and why: one row a set."""
        rows = {}
        for values in (self.first, self.second):
            examples = values.examples
            rows[examples.label] = {
                "used": examples.num_examples,
                "in pairs": len(self.pairs),
                "truncated": examples.num_truncated,
                "left out": len(examples.left_out),
                "why": "; ".join(f"{n} x {why}" for why, n in examples.reasons().items()),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def table(self) -> pd.DataFrame:
        """One row a projection: the contrast's numbers with their limits."""
        examples = self.first.examples
        layers = np.asarray(examples.layers)
        columns: dict[str, object] = {
            "mean, first": self.first.per_example.mean(axis=0),
            "mean, second": self.second.per_example.mean(axis=0),
        }
        for name, interval in (
            ("difference", self.difference_P),
            ("ratio", self.ratio_P),
            ("mean |RD|", self.mean_absolute_rd_P),
            ("MAD difference", self.mad_difference_P),
            ("AUC", self.chance_smaller_P),
        ):
            if interval is not None:
                columns |= {name: interval.estimate, f"{name} low": interval.low}
                columns[f"{name} high"] = interval.high
                if interval.method == "debiased":
                    columns[f"{name} bias"] = interval.bias
        columns["sign-flip p"] = self.sign_flip.p_P
        columns["largest layers"] = [
            ", ".join(map(str, layers[places])) for places in self.largest.T
        ]
        return pd.DataFrame(columns, index=list(examples.projections))


def contrast(
    first: ExampleSet,
    second: ExampleSet,
    statistic: str = "nuclear_norm",
    *,
    pairs: Pairs | None = None,
    same_model: bool = True,
    resampling: Resampling = Resampling(),
) -> Contrast:
    """Compares two sets by one statistic.

    Means, RD and AUC are of all examples of each set. The bootstrap draws the two examples of a pair
    together. p uses the pairs only.

    Args:
        first: The reference set (correct responses, or no chain of thought).
        second: The other.
        statistic: See `ExampleSet.values`.
        pairs: Positions in `first` and `second`; by default those of equal instruction. Given pairs
            need a statistic that is defined for every example.
        same_model: See `check_comparable`.
        resampling: See there.

    Raises:
        UserError: Sets that cannot be compared, or a statistic that was not measured or, with
            `pairs`, is undefined for an example.
    """
    note = check_comparable(first, second, same_model=same_model)
    one, two = first.values(statistic), second.values(statistic)
    if pairs is None:
        pairs = pair_by_instruction(one.examples, two.examples)
    elif (one.examples.num_examples, two.examples.num_examples) != (
        first.num_examples,
        second.num_examples,
    ):
        raise UserError(
            f"{statistic} is undefined for an example of {first.label} or {second.label}, so the "
            "given pairs do not fit. Pair the sets of `.values(statistic).examples` instead."
        )

    draws = MeanDraws(one.value_ELP, two.value_ELP, pairs=pairs.places, resampling=resampling)

    def about(name: str, of: Interval) -> str | None:
        return None if of.note in (None, rd_LP.note) else f"{name}: {of.note}"

    rd_LP = draws.interval(curves.relative_difference)
    absolute = draws.interval(curves.mean_absolute_rd, "debiased")
    if np.isnan(rd_LP.estimate).any():
        note = joined(note, "no RD where the reference is zero")
    mad_difference = None
    if one.examples.has_every_layer and two.examples.has_every_layer:
        mad_difference = draws.difference(curves.mad)
        note = joined(note, about("MAD difference", mad_difference))
    else:
        note = joined(note, "no MAD: not every layer of the model was measured")
    per_first, per_second = one.per_example, two.per_example
    return Contrast(
        first=one,
        second=two,
        pairs=pairs,
        difference_P=draws.interval(lambda a, b: (b - a).mean(axis=-2)),
        ratio_P=draws.interval(_ratio),
        rd_LP=rd_LP,
        mean_absolute_rd_P=absolute,
        mad_difference_P=mad_difference,
        largest=curves.largest_layers(rd_LP.estimate),
        sign_flip=sign_flip_test(
            per_second[pairs.second] - per_first[pairs.first], resampling=resampling
        ),
        chance_smaller_P=chance_smaller(
            per_first, per_second, pairs=pairs.places, resampling=resampling
        ),
        note=joined(note, rd_LP.note, about("mean |RD|", absolute)),
    )


def _identity(curve_LP: np.ndarray) -> np.ndarray:
    return curve_LP


def _over_layers(curve_LP: np.ndarray) -> np.ndarray:
    return curve_LP.mean(axis=-2)


def _ratio(first_LP: np.ndarray, second_LP: np.ndarray) -> np.ndarray:
    first_P, second_P = _over_layers(first_LP), _over_layers(second_LP)
    return np.where(first_P == 0, np.nan, second_P / np.where(first_P == 0, 1.0, first_P))
