"""What happens to a contrast under a control: it stands, is not shown, or turns round."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxgrad.analysis import Contrast, Interval
from jaxgrad.analysis.resampling import FEW_EXAMPLES
from jaxgrad.report.comparisons import NORM, Comparison

Verdict = Literal["stands", "not shown", "turns round", "no contrast", "not known"]


@dataclass(frozen=True)
class Verdicts:
    """What happens to one projection's contrast of the nuclear norm.

    Attributes:
        direction: Of the contrast: -1 where the second's norm is smaller, 1 where it is larger, 0 where
            the interval of the difference holds zero.
        sum_loss, matched, regression: Under each control for length.
        leakage: Without the leaked pairs.
    """

    direction: int
    sum_loss: Verdict
    matched: Verdict
    regression: Verdict
    leakage: Verdict

    @property
    def of_length(self) -> tuple[Verdict, Verdict, Verdict]:
        """The controls for length."""
        return self.sum_loss, self.matched, self.regression


def direction(interval: Interval | None, p: int, no_difference: float = 0.0) -> int | None:
    """On which side of "no difference" the interval of a component [P] lies.

    | interval | result |
    |---|---|
    | below | -1 |
    | above | 1 |
    | holds no difference, its limits included | 0 |
    | none, or without limits | None |
    """
    if interval is None or np.isnan(interval.low[p]) or np.isnan(interval.high[p]):
        return None
    if interval.high[p] < no_difference:
        return -1
    return 1 if interval.low[p] > no_difference else 0


def judge(of_contrast: int | None, under_control: int | None) -> Verdict:
    """The verdict from two directions: of the contrast, and of the contrast under the control.

    | contrast | control | verdict |
    |---|---|---|
    | not known | any | not known |
    | 0 | any | no contrast: there is nothing to control |
    | -1 or 1 | not known | not known |
    | -1 or 1 | the same | stands |
    | -1 or 1 | 0 | not shown |
    | -1 or 1 | the other | turns round |
    """
    if of_contrast is None:
        return "not known"
    if of_contrast == 0:
        return "no contrast"
    if under_control is None:
        return "not known"
    if under_control == 0:
        return "not shown"
    return "stands" if under_control == of_contrast else "turns round"


def verdict_of(comparison: Comparison, p: int) -> Verdicts:
    """What happens to projection `p`'s contrast of the nuclear norm."""
    contrast = comparison.contrasts[NORM]
    found = direction(contrast.difference_P, p)

    def under(control: Contrast | None) -> Verdict:
        return judge(found, direction(None if control is None else control.difference_P, p))

    regression, leakage = comparison.regression, comparison.leakage
    adjusted = regression.adjusted_P if regression and regression_decides(comparison) else None
    return Verdicts(
        direction=found or 0,
        sum_loss=under(comparison.summed),
        matched=under(comparison.matched if matching_decides(comparison) else None),
        regression=judge(found, direction(adjusted, p)),
        leakage=under(None if leakage is None else leakage.without),
    )


def matching_decides(comparison: Comparison) -> bool:
    """Whether enough examples have a partner of their length for a meaningful interval."""
    return comparison.match is not None and len(comparison.match.pairs) >= FEW_EXAMPLES


def regression_decides(comparison: Comparison) -> bool:
    """Whether enough examples are within the other set's range of lengths; else it extrapolates."""
    found = comparison.regression
    if found is None:
        return False
    return found.overlap * (found.first.num_examples + found.second.num_examples) >= FEW_EXAMPLES
