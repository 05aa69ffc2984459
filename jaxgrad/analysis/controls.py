"""Is a contrast due to the reasoning, to the length or to a leak? Contrasts with one explanation removed.

The loss is usually a mean over response tokens. Long responses then have small gradients because of their
length alone. Three controls ask how much of a contrast that explains: the summed loss, sets matched on
length, and a regression with a length term. No control is enough by itself: with the sum, norms grow with
the length; matching keeps only the lengths that both sets have; the regression extrapolates where they have
none in common. Each result says how far it can be trusted.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxgrad.analysis.contrasts import Contrast, contrast
from jaxgrad.analysis.example_set import ExampleSet
from jaxgrad.analysis.intervals import Interval, MeanDraws
from jaxgrad.analysis.pairing import Pairs, check_comparable, pair_by_instruction
from jaxgrad.analysis.resampling import Resampling, joined
from jaxgrad.errors import UserError

# Responses within 10 % of each other's length.
DEFAULT_CALIPER = 0.1
# Relative to the lengths' spread: below it a set's lengths are all the same.
_NO_SPREAD = 1e-9


def sum_loss_contrast(
    first: ExampleSet,
    second: ExampleSet,
    *,
    same_model: bool = True,
    resampling: Resampling = Resampling(),
) -> Contrast:
    """The contrast of the nuclear norm for the sum instead of the mean of the token losses.

    For runs that measured the sum it is the contrast of the nuclear norm itself.

    Raises:
        UserError: As `contrast`; the response tokens are unknown, or the loss is neither of the two.
    """
    return contrast(first, second, "sum_loss_norm", same_model=same_model, resampling=resampling)


@dataclass(frozen=True)
class LengthMatch:
    """Examples of two sets with responses of about the same length.

    Attributes:
        first, second: The matched examples, in the order of their data files; `left_out` says who is
            not among them.
        pairs: Who belongs to whom: positions in the two sets.
        caliper: Largest |ln tokens2 - ln tokens1| allowed.
        difference_before: Mean ln response tokens of the second set minus the first, all examples.
        difference_after: The same of the matched examples; NaN where there are none.
        largest_after: The largest |difference| within a pair; NaN where there are none.
    """

    first: ExampleSet
    second: ExampleSet
    pairs: Pairs
    caliper: float
    difference_before: float
    difference_after: float
    largest_after: float


def match_response_tokens(
    first: ExampleSet, second: ExampleSet, *, caliper: float = DEFAULT_CALIPER
) -> LengthMatch:
    """Matches one to one on log response tokens, without replacement.

    Of all matchings with as many pairs as the caliper allows, this is the one with the smallest sum of
    |differences|. It does not depend on the order of the examples, as a greedy choice would. Time and
    memory grow with E1 * E2 (500 x 500: 0.1 s).

    | case | result |
    |---|---|
    | no two responses within the caliper | no pair; the differences after are NaN |
    | caliper 0 | equal lengths alone |

    Raises:
        UserError: A caliper that is negative or not finite, response tokens that are unknown.
    """
    if not (np.isfinite(caliper) and caliper >= 0):
        raise UserError(f"caliper is {caliper}: give a difference of log lengths, like 0.1.")
    first, second = _with_lengths(first), _with_lengths(second)
    one, two = np.log(first.response_tokens), np.log(second.response_tokens)
    distance = np.abs(one[:, None] - two)
    # The tolerance keeps a pair whose difference is the caliper itself, up to rounding.
    allowed = distance <= caliper * (1 + 1e-12)
    # One forbidden pair costs more than all allowed ones together, so the number of pairs comes first.
    forbidden = (caliper + 1) * (min(distance.shape) + 1)
    rows, columns = linear_sum_assignment(np.where(allowed, distance, forbidden))
    kept = allowed[rows, columns]
    rows, columns = rows[kept], columns[kept]
    remaining = two[columns] - one[rows]
    none = len(rows) == 0
    reason = f"no partner within {caliper:g} in log response tokens"
    # `subset` keeps the order of the set, so the positions in the second set are ranked anew.
    place = np.empty(len(columns), np.int64)
    place[np.argsort(columns)] = np.arange(len(columns))
    return LengthMatch(
        first=first.subset(np.isin(np.arange(len(one)), rows), reason),
        second=second.subset(np.isin(np.arange(len(two)), columns), reason),
        pairs=Pairs(np.arange(len(rows)), place, "response tokens"),
        caliper=caliper,
        difference_before=float(two.mean() - one.mean()),
        difference_after=float("nan") if none else float(remaining.mean()),
        largest_after=float("nan") if none else float(np.abs(remaining).max()),
    )


def matched_contrast(
    first: ExampleSet,
    second: ExampleSet,
    statistic: str = "nuclear_norm",
    *,
    caliper: float = DEFAULT_CALIPER,
    same_model: bool = True,
    resampling: Resampling = Resampling(),
) -> tuple[LengthMatch, Contrast | None]:
    """The contrast between examples matched on length; None where no two match.

    Matched examples are the pairs here, for the resampling and for the sign flips. So p asks whether two
    responses of one length could be swapped.

    Raises:
        UserError: As `match_response_tokens` and `contrast`.
    """
    check_comparable(first, second, same_model=same_model)
    usable = (first.values(statistic).examples, second.values(statistic).examples)
    match = match_response_tokens(*usable, caliper=caliper)
    if len(match.pairs) == 0:
        return match, None
    return match, contrast(
        match.first,
        match.second,
        statistic,
        pairs=match.pairs,
        same_model=same_model,
        resampling=resampling,
    )


@dataclass(frozen=True)
class LengthRegression:
    """Least squares of y on the set, without and with log response tokens, a projection at a time.

    Attributes:
        first, second: The examples used.
        contrast_P: Coefficient of "is of the second set" alone: the difference of the means of y.
        adjusted_P: The same with the length term beside it.
        slope_P: Coefficient of ln response tokens, one for both sets.
        overlap: Share of the examples whose length is within the range of the other set. At 0 the
            adjusted contrast is an extrapolation.
        log_value: y is the natural logarithm of the example's value.
        note: What limits it; None if nothing does.
    """

    first: ExampleSet
    second: ExampleSet
    contrast_P: Interval
    adjusted_P: Interval
    slope_P: Interval
    overlap: float
    log_value: bool
    note: str | None

    @property
    def adjusted_ratio(self) -> Interval:
        """With `log_value`: exp of `adjusted_P`, a ratio. exp is monotone, so limits stay limits."""
        log_P = self.adjusted_P
        limits = {name: np.exp(getattr(log_P, name)) for name in ("estimate", "low", "high")}
        return dataclasses.replace(log_P, **limits, bias=np.full_like(log_P.bias, np.nan))


def length_regression(
    first: ExampleSet,
    second: ExampleSet,
    statistic: str = "nuclear_norm",
    *,
    log_value: bool = True,
    same_model: bool = True,
    resampling: Resampling = Resampling(),
) -> LengthRegression:
    """How much of a contrast a log-length term explains.

    y = a + b [second set] + c ln(response tokens). By the theorem of Frisch, Waugh and Lovell, c is the
    covariance of y and the log length within the sets, over the variance of the log length there, and
    b = (mean y2 - mean y1) - c (mean log length2 - mean log length1). Both are functions of means over
    examples, so the same bootstrap makes their intervals: pairs are drawn as units, and nothing is assumed
    of the errors' variance.

    Args:
        first: The reference set.
        second: The other.
        statistic: Of which an example's y is the mean over layers.
        log_value: Take the logarithm as y: a norm falls with length by a factor, and exp(b) is the ratio
            of the sets. False: y is the value itself.
        same_model: See `check_comparable`.
        resampling: See there.

    Returns:
        The coefficients. `adjusted_P` and `slope_P` are NaN, with a note, where the lengths do not vary
        within the sets: then length and set cannot be told apart.

    Raises:
        UserError: Sets that cannot be compared, unknown response tokens, or a value that is not
            positive with `log_value`.
    """
    note = check_comparable(first, second, same_model=same_model)
    values = [_with_lengths(examples).values(statistic) for examples in (first, second)]
    sets = [value.examples for value in values]
    y = [value.per_example for value in values]
    if log_value:
        if min(part.min() for part in y) <= 0:
            raise UserError(
                f"{statistic} is not positive for an example, and has no logarithm. "
                "Choose log_value=False or another statistic."
            )
        y = [np.log(part) for part in y]
    x = [np.log(examples.response_tokens)[:, None] for examples in sets]
    # Centred first: the variance is then not a difference of large numbers.
    centre_x, centre_y = np.concatenate(x).mean(axis=0), np.concatenate(y).mean(axis=0)
    x, y = [part - centre_x for part in x], [part - centre_y for part in y]
    sizes = [len(part) for part in x]
    spread = float(np.square(np.concatenate(x)).mean())
    moments = [
        np.stack(np.broadcast_arrays(a, a * a, b, a * b), axis=1) for a, b in zip(x, y, strict=True)
    ]
    pairs = pair_by_instruction(*sets)

    def slope(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        variance = covariance = np.float64(0)
        for size, m in zip(sizes, (one, two), strict=True):
            variance = variance + size * (m[:, 1] - m[:, 0] ** 2)
            covariance = covariance + size * (m[:, 3] - m[:, 0] * m[:, 2])
        none = variance <= _NO_SPREAD * max(spread, _NO_SPREAD) * sum(sizes)
        return np.where(none, np.nan, covariance / np.where(none, 1.0, variance))

    def plain(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return two[:, 2] - one[:, 2]

    def adjusted(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return plain(one, two) - slope(one, two) * (two[:, 0] - one[:, 0])

    draws = MeanDraws(*moments, pairs=pairs.places, resampling=resampling)
    without, beside, of_length = (draws.interval(of) for of in (plain, adjusted, slope))
    overlap = _overlap(*(part[:, 0] for part in x))
    if np.isnan(beside.estimate).any():
        note = joined(note, "no adjusted contrast: the length does not vary within the sets")
    elif overlap == 0:
        note = joined(note, "no lengths in common: the adjusted contrast is an extrapolation")
    note = joined(note, without.note)
    return LengthRegression(sets[0], sets[1], without, beside, of_length, overlap, log_value, note)


def _overlap(one_E: np.ndarray, two_E: np.ndarray) -> float:
    inside = [(a >= b.min()) & (a <= b.max()) for a, b in ((one_E, two_E), (two_E, one_E))]
    return float(np.concatenate(inside).mean())


@dataclass(frozen=True)
class Leakage:
    """Pairs whose "irrelevant" response is the correct one by chance.

    Attributes:
        num_pairs: Instructions with a response in both sets.
        num_leaked: Of them, those with equal responses (white space at the ends does not count).
        everything: The contrast of all examples.
        without: The contrast without the leaked pairs; None where nothing is left of a set.
    """

    num_pairs: int
    num_leaked: int
    everything: Contrast
    without: Contrast | None


def leakage_contrast(
    correct: ExampleSet,
    irrelevant: ExampleSet,
    statistic: str = "nuclear_norm",
    *,
    same_model: bool = True,
    resampling: Resampling = Resampling(),
) -> Leakage:
    """The contrast of correct and irrelevant responses, with and without the pairs that leak.

    Shuffled answers are often right by chance: half of them where the answer is yes or no.

    Raises:
        UserError: As `contrast`.
    """
    everything = contrast(
        correct, irrelevant, statistic, same_model=same_model, resampling=resampling
    )
    pairs = pair_by_instruction(correct, irrelevant)
    leaked = leaked_pairs(correct, irrelevant, pairs)
    kept = []
    for examples, places in ((correct, pairs.first), (irrelevant, pairs.second)):
        keep_E = np.ones(examples.num_examples, bool)
        keep_E[places[leaked]] = False
        kept.append(examples.subset(keep_E, "irrelevant response equals the correct one"))
    without = None
    if min(examples.num_examples for examples in kept):
        without = contrast(
            kept[0], kept[1], statistic, same_model=same_model, resampling=resampling
        )
    return Leakage(len(pairs), int(leaked.sum()), everything, without)


def leaked_pairs(correct: ExampleSet, irrelevant: ExampleSet, pairs: Pairs) -> np.ndarray:
    """Mask of the pairs with equal responses; white space at the ends does not count, null is unequal."""
    texts = [
        (correct.responses[a], irrelevant.responses[b])
        for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    ]
    return np.array(
        [one is not None and two is not None and one.strip() == two.strip() for one, two in texts],
        bool,
    )


def _with_lengths(examples: ExampleSet) -> ExampleSet:
    known_E = examples.response_tokens >= 1
    if not known_E.any():
        raise UserError(
            f"{examples.label}: its response tokens are unknown (the authors' files have none), so "
            "nothing can be said of length. Analyze the data with this program."
        )
    return examples if known_E.all() else examples.subset(known_E, "response tokens unknown")
