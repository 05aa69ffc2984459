"""What a report shows, in words: each sentence is made of the numbers of its tables."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxgrad.analysis import Contrast, Interval
from jaxgrad.analysis.curves import mad
from jaxgrad.analysis.resampling import FEW_EXAMPLES
from jaxgrad.report.cells import CORRECT
from jaxgrad.report.comparisons import NORM, Comparison, Report
from jaxgrad.report.tables import Form, written
from jaxgrad.report.verdicts import (
    Verdict,
    Verdicts,
    direction,
    matching_decides,
    regression_decides,
    verdict_of,
)

# A p below which two responses count as told apart in a sentence; the tables have every p.
_SMALL_P = 0.05
_SINGULAR = {"stands": "stands", "not shown": "is not shown", "turns round": "turns round"}
_PLURAL = {"stands": "stand", "not shown": "are not shown", "turns round": "turn round"}
Outcome = Literal["stands", "falls", "unclear", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that the runs show, or do not show.

    Attributes:
        heading: What it is about.
        lead: The finding, and what becomes of it under the controls, in a line or two.
        sentences: The same at length, with numbers.
        outcome: What becomes of it under the controls: "stands" under all that could be made,
            "falls" under at least one, "unclear" where there is no contrast or no control; "info"
            where none is asked.
    """

    heading: str
    lead: str
    sentences: tuple[str, ...]
    outcome: Outcome


def findings(report: Report) -> list[Finding]:
    """The findings: settings first, then responses, models, and what limits all of it."""
    several = len(report.models()) > 1

    def where(model: str, data: str) -> str:
        """The start of a heading: the model where there are several, and the data set."""
        named = ", ".join(part for part in (model if several else "", data) if part)
        return f"{named}: " if named else ""

    found = [
        _setting(where(c.first.role.model, c.first.role.data), c)
        for c in _ends(report)
        if NORM in c.contrasts
    ]
    for model in report.models():
        for data in report.data_sets():
            by_setting = [
                c
                for c in report.comparisons
                if c.kind == "response"
                and (c.first.role.model, c.first.role.data) == (model, data)
                and NORM in c.contrasts
            ]
            if by_setting:
                found.append(_responses(where(model, data), by_setting))
    found += [_model(c) for c in report.comparisons if c.kind == "model" and NORM in c.contrasts]
    found.append(_limits(report))
    return found


def _ends(report: Report) -> list[Comparison]:
    """The comparisons of each data set's first setting with its last, correct responses."""
    by_set: dict[tuple[str, str], list[str]] = {}
    for cell in report.cells:
        role = cell.role
        if role.response == CORRECT:
            by_set.setdefault((role.model, role.data), []).append(role.setting)
    return [
        c
        for c in report.comparisons
        if c.kind == "setting"
        and c.first.role.response == CORRECT
        and [c.first.role.setting, c.second.role.setting]
        == [by_set[c.first.role.model, c.first.role.data][k] for k in (0, -1)]
    ]


def _setting(where: str, c: Comparison) -> Finding:
    norm = c.contrasts[NORM]
    projections = norm.first.examples.projections
    one, two = c.first.role.setting, c.second.role.setting
    sentences = [
        f"The mean nuclear norm of {two} is {_factors(norm.ratio_P, projections)} times that of {one}; "
        f"a random example of {two} has a smaller norm than one of {one} with a chance of "
        f"{_range(norm.chance_smaller_P.estimate)}{_p(norm)}."
    ]
    if norm.mad_difference_P is not None:
        mads = [mad(part.value_ELP.mean(axis=0)) for part in (norm.first, norm.second)]
        ratio = [
            f"{p} {written(a)} to {written(b)}" for p, a, b in zip(projections, *mads, strict=True)
        ]
        sides = [direction(norm.mad_difference_P, k) for k in range(len(projections))]
        sentences.append(f"MAD goes from {', '.join(ratio)}; {_sides(sides, projections)}.")
    rank = c.contrasts.get("effective_rank")
    share = c.contrasts.get("effective_rank_fraction")
    if rank is not None and share is not None:
        sentences.append(
            f"The effective rank is {_factors(rank.ratio_P, projections)} times as large, as a share of "
            f"its ceiling {_factors(share.ratio_P, projections)} times."
        )
    verdicts = [verdict_of(c, k) for k in range(len(projections))]
    summed = c.summed
    if summed is not None:
        sentences.append(
            f"Length, by the sum of the loss in place of its mean: the ratio is "
            f"{_factors(summed.ratio_P, projections)}: the contrast "
            f"{_verdicts((v.sum_loss for v in verdicts), projections)}."
        )
    sentences += _matched_and_adjusted(c, verdicts)
    of_length = [verdict for v in verdicts for verdict in v.of_length]
    directions = [v.direction for v in verdicts]
    lead = (
        f"Gradients are {_size(directions)} in {two} than in {one} "
        f"({_range(norm.ratio_P.estimate)} times the nuclear norm). {_under_length(verdicts)}"
        if any(directions)
        else f"The nuclear norms of {one} and {two} are not told apart "
        f"({_range(norm.ratio_P.estimate)} times)."
    )
    return Finding(f"{where}{one} against {two}", lead, tuple(sentences), _outcome(of_length))


def _matched_and_adjusted(c: Comparison, verdicts: Sequence[Verdicts]) -> list[str]:
    """The two controls that need response lengths in common, a sentence each."""
    projections = c.contrasts[NORM].first.examples.projections
    sentences = []
    if c.match is not None:
        sentences.append(
            "Length, by examples matched on response tokens (within 10 %): no two match."
            if c.matched is None
            else f"Length, by {len(c.match.pairs)} pairs matched on response tokens (within 10 %): the "
            f"ratio is {_factors(c.matched.ratio_P, projections)}: "
            + (
                f"the contrast {_verdicts((v.matched for v in verdicts), projections)}."
                if matching_decides(c)
                else "too few to decide."
            )
        )
    if c.regression is not None:
        overlap = written(c.regression.overlap, "percent")
        adjusted = _factors(c.regression.adjusted_ratio, projections)
        sentences.append(
            f"Length, by regression on its logarithm ({overlap} of the examples within the other set's "
            f"lengths): the ratio is {adjusted}: "
            + (
                f"the contrast {_verdicts((v.regression for v in verdicts), projections)}."
                if regression_decides(c)
                else "an extrapolation beyond the lengths of both, which decides nothing."
            )
        )
    return sentences


def _size(sides: Sequence[int]) -> str:
    named = {side: word for side, word in ((-1, "smaller"), (1, "larger")) if side in sides}
    return " and ".join(
        word + ("" if set(sides) == {side} else f" (in {sides.count(side)} of {len(sides)})")
        for side, word in named.items()
    )


def _under_length(verdicts: Sequence[Verdicts]) -> str:
    """What is left of the contrasts under each control for length, one phrase a control."""
    parts = []
    for name, of in (
        ("with the summed loss", [v.sum_loss for v in verdicts]),
        ("among examples matched on length", [v.matched for v in verdicts]),
        ("in the regression on length", [v.regression for v in verdicts]),
    ):
        judged = _judged(of)
        if not judged:
            continue
        counts = Counter(judged)
        said = ", ".join(
            _SINGULAR[verdict] + ("" if n == len(judged) else f" in {n} of {len(judged)}")
            for verdict, n in counts.items()
        )
        parts.append(f"it {said} {name}")
    if not parts:
        return "No control for length could decide."
    return f"Controlled for length, {'; '.join(parts)}."


def _responses(where: str, comparisons: Sequence[Comparison]) -> Finding:
    sentences: list[str] = []
    judged: list[Verdicts] = []
    without_leaks: list[Verdict] = []
    told_apart: list[str] = []
    sizes: list[str] = []
    leaks = 0
    for c in comparisons:
        contrast, setting = c.contrasts[NORM], c.first.role.setting
        found = [verdict_of(c, k) for k in range(len(contrast.first.examples.projections))]
        rd_P, p_P = contrast.mean_absolute_rd_P.estimate, contrast.sign_flip.p_P
        sizes.append(f"{written(float(rd_P.mean()), 'percent')} in {setting}")
        sentences.append(_response_setting(c, found))
        leaked = 0 if c.leakage is None else c.leakage.num_leaked
        leaks += leaked
        # Responses that are not told apart have no contrast that a control could take away.
        if (p_P < _SMALL_P).sum() * 2 > len(p_P):
            told_apart.append(setting)
            judged += found
            without_leaks += [v.leakage for v in found if leaked]
    lead = (
        f"Irrelevant responses change the nuclear norm of a layer by {', '.join(sizes)}; told apart "
        f"(p below {_SMALL_P} in most projections) in {', '.join(told_apart) or 'none of them'}."
    )
    if leaks:
        lead += f" {leaks} pairs leak the correct answer."
    if without_leaks:
        lead += f" Without them, {_left(without_leaks)}."
    if told_apart:
        lead += f" {_under_length(judged)}"
    outcome = _outcome([*without_leaks, *(verdict for v in judged for verdict in v.of_length)])
    return Finding(f"{where}correct against irrelevant", lead, tuple(sentences), outcome)


def _response_setting(c: Comparison, found: Sequence[Verdicts]) -> str:
    contrast, leakage = c.contrasts[NORM], c.leakage
    projections = contrast.first.examples.projections
    sentence = (
        f"{c.first.role.setting}: irrelevant responses change the norm of a layer by "
        f"{_list(contrast.mean_absolute_rd_P.estimate, projections, 'percent')} on average over layers; "
        f"their mean is {_factors(contrast.ratio_P, projections)} times as large{_p(contrast)}."
    )
    summed = c.summed
    if summed is not None:
        sentence += (
            f" With the summed loss it is {_factors(summed.ratio_P, projections)} times: the contrast "
            f"{_verdicts((v.sum_loss for v in found), projections)}."
        )
    sentence = " ".join([sentence, *_matched_and_adjusted(c, found)])
    if leakage is None:
        return sentence
    if not leakage.num_leaked:
        return f"{sentence} No leak in {leakage.num_pairs} pairs."
    sentence += (
        f" In {leakage.num_leaked} of {leakage.num_pairs} pairs the irrelevant response is the correct "
        "one; without them "
    )
    if leakage.without is None:
        return f"{sentence}nothing is left."
    rd = leakage.without.mean_absolute_rd_P.estimate
    return (
        f"{sentence}the change is {_list(rd, projections, 'percent')}, and the contrast "
        f"{_verdicts((v.leakage for v in found), projections)}."
    )


def _left(verdicts: Sequence[Verdict]) -> str:
    """How many contrasts stand, are not shown, turn round."""
    counts = Counter(_judged(verdicts))
    total = counts.total()
    if not total:
        return "none could be judged"
    return ", ".join(
        f"{n} of {total} contrasts {_PLURAL[verdict]}" for verdict, n in counts.items()
    )


def _model(c: Comparison) -> Finding:
    norm = c.contrasts[NORM]
    projections = norm.first.examples.projections
    sentence = (
        f"The mean nuclear norm of {c.second.role.model} is {_factors(norm.ratio_P, projections)} "
        f"times that of {c.first.role.model}{_p(norm)}."
    )
    heading = f"{c.first.role.title}: base against instruction-tuned"
    return Finding(heading, sentence, (), "info")


def _limits(report: Report) -> Finding:
    sentences = [
        "Intervals are of one number each, and are not widened for their number; the tables have p "
        "adjusted for it (false discovery rate).",
        "What is shown is shown of these examples and models. A contrast that stands under the "
        "controls for length may still have another reason.",
    ]
    left_out = sum(len(cell.examples.left_out) for cell in report.cells)
    used = sum(cell.examples.num_examples for cell in report.cells)
    sentences.append(
        f"{used} examples are used and {left_out} left out, the reasons stand in the first table."
    )
    truncated = sum(cell.examples.num_truncated or 0 for cell in report.cells)
    if truncated:
        sentences.append(f"{truncated} of those used were cut at the run's max_length.")
    small = [c for c in report.cells if c.examples.num_examples < FEW_EXAMPLES]
    if small:
        sentences.append(
            f"{len(small)} of {len(report.cells)} runs have fewer than {FEW_EXAMPLES} examples: their "
            "intervals are known to be too narrow, and with one example there is none."
        )
    sentences += _missing(report)
    sentences += [f"Not there: {what}: {why}" for what, why in report.unavailable.items()]
    return Finding("What limits all of it", sentences[1], (sentences[0], *sentences[2:]), "info")


def _missing(report: Report) -> list[str]:
    """What could not be computed and what limits an interval: each reason once, with how often."""
    names = {name: found.title for name, found in report.statistics.items()}
    sentences = []
    for what, parts in (("runs", report.curves), ("comparisons", report.comparisons)):
        found = Counter((name, _shape(why)) for part in parts for name, why in part.missing.items())
        sentences += [
            f"{names.get(name, name)} is missing in {count} of {len(parts)} {what}: {why}"
            for (name, why), count in found.items()
        ]
    notes = Counter(
        note for c in report.comparisons for note in _notes(c.contrasts.get(NORM)) if note
    )
    sentences += [
        f"In {count} of {len(report.comparisons)} comparisons of the nuclear norm: {note}."
        for note, count in notes.items()
    ]
    return sentences


def _shape(why: str) -> str:
    """A reason without its run: "LABEL: loss was not measured" becomes "loss was not measured"."""
    return why.split(": ", 1)[-1]


def _notes(contrast: Contrast | None) -> list[str]:
    return contrast.note.split("; ") if contrast is not None and contrast.note else []


def _list(values_P: Iterable[float], projections: Sequence[str], form: Form = "number") -> str:
    """As "q 0.20, k 0.18"."""
    return ", ".join(
        f"{p} {written(float(value), form)}" for p, value in zip(projections, values_P, strict=True)
    )


def _factors(interval: Interval, projections: Sequence[str]) -> str:
    return _list(interval.estimate, projections)


def _range(values: np.ndarray) -> str:
    low, high = written(float(np.nanmin(values))), written(float(np.nanmax(values)))
    return low if low == high else f"{low} to {high}"


def _p(contrast: Contrast) -> str:
    p_P = contrast.sign_flip.p_P
    if np.isnan(p_P).all():
        return " (no pairs, so no p)"
    return f" (p at most {written(float(np.nanmax(p_P)), 'p')} over {contrast.sign_flip.num_pairs} pairs)"


def _sides(sides: Sequence[int | None], projections: Sequence[str]) -> str:
    words: dict[int | None, str] = {
        -1: "smaller in {}",
        1: "larger in {}",
        0: "the interval of the difference holds zero in {}",
        None: "without an interval in {}",
    }
    return _grouped(sides, projections, lambda side: words[side])


def _verdicts(verdicts: Iterable[Verdict], projections: Sequence[str]) -> str:
    words: dict[Verdict, str] = {
        "stands": "stands in {}",
        "not shown": "is not shown in {}",
        "turns round": "turns round in {}",
        "no contrast": "was none in {}",
        "not known": "is not known in {}",
    }
    return _grouped(list(verdicts), projections, lambda verdict: words[verdict])


def _grouped(values: Sequence, projections: Sequence[str], words: Callable[..., str]) -> str:
    parts = []
    for value in dict.fromkeys(values):
        of = [p for p, v in zip(projections, values, strict=True) if v == value]
        parts.append(words(value).format("all" if len(of) == len(projections) else ", ".join(of)))
    return ", ".join(parts)


def _judged(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Leaves out verdicts where there was no contrast, or where the control could not decide."""
    return [verdict for verdict in verdicts if verdict not in ("no contrast", "not known")]


def _outcome(verdicts: Sequence[Verdict]) -> Outcome:
    made = _judged(verdicts)
    if not made:
        return "unclear"
    return "stands" if all(v == "stands" for v in made) else "falls"
