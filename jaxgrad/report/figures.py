"""Every figure of a report as SVG and PNG, in the arrangement of the paper.

    curves.MODEL.DATA.STATISTIC   curves over layers, a panel a setting, a row a response
    rd.KIND.MODEL.DATA            relative difference over layers: responses, or two models
    mad.MODEL                     MAD by setting, a panel a data set
    length.MODEL                  what is left of a contrast of settings with length controlled
    similarity.MODEL.ROLE         cosines between layers and between partners, one run

Arrangement: Li, Li & Zhou, ACL 2025 (arXiv 2410.23743).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxgrad.analysis import Interval
from jaxgrad.errors import UserError
from jaxgrad.report.canvas import drawing, save
from jaxgrad.report.cells import CORRECT, RESPONSES, Cell, Role, file_stem
from jaxgrad.report.comparisons import CURVE_STATISTICS, NORM, Comparison, Report
from jaxgrad.report.panels import (
    Curves,
    Points,
    curves_figure,
    ratios_figure,
    settings_figure,
    similarity_figure,
)
from jaxgrad.report.style import loss_words
from jaxgrad.report.verdicts import matching_decides, regression_decides
from jaxgrad.results.losses import RESPONSE_MEAN

YLimits = Literal["shared", "free"] | tuple[float, float]

# The colours of cosines go from minus to plus one of these: the smallest that holds 99 % of the cosines
# beside the diagonals.
_BOUNDS = (0.1, 0.2, 0.5, 1.0)
_LONGEST_STEM = 60


@dataclass(frozen=True)
class FigureFile:
    """A figure that was written.

    Attributes:
        name: Of its files, without suffix; no two of a report are equal.
        title: What it shows; plain text, from data: escape it in HTML.
        caption: How to read it; plain text, from data.
        svg, png: The files.
    """

    name: str
    title: str
    caption: str
    svg: Path
    png: Path


@dataclass(frozen=True)
class PlannedFigure:
    """A figure to be drawn, within `canvas.drawing`.

    Attributes:
        parts: Of its name: its kind, then names from data.
        title, caption: As of `FigureFile`.
        draw: Makes it.
    """

    parts: tuple[str, ...]
    title: str
    caption: str
    draw: Callable[[], Figure]


def write_figures(
    report: Report, directory: Path, *, y_limits: YLimits = "shared", progress: bool = False
) -> list[FigureFile]:
    """Writes all figures for which the report has the data; the same report gives the same bytes.

    Args:
        report: What to show.
        directory: Is made where it is not there; files of the same names are replaced.
        y_limits: Of the curves: "shared" by all panels of a figure (as in the paper), "free", or
            (low, high) for the nuclear norm and "shared" for the other statistics.
        progress: Show a bar on stderr.

    Raises:
        UserError: `y_limits` is none of these.
    """
    if not isinstance(y_limits, str):
        low, high = y_limits
        if not (np.isfinite([low, high]).all() and low < high):
            raise UserError(f"The y limits are {low}, {high}: give a smaller and a larger number.")
    elif y_limits not in ("shared", "free"):
        raise UserError(f"The y limits are {y_limits!r}: give shared, free or two numbers.")
    directory.mkdir(parents=True, exist_ok=True)
    written, taken = [], set()
    plans = list(plan_figures(report, y_limits))
    for plan in tqdm(plans, desc="figures", disable=not progress, dynamic_ncols=True):
        stem = ".".join(_stem(part) for part in plan.parts if part)
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        with drawing():
            svg, png = save(plan.draw(), directory, name, plan.title)
        written.append(FigureFile(name, plan.title, plan.caption, svg, png))
    return written


def plan_figures(report: Report, y_limits: YLimits = "shared") -> Iterator[PlannedFigure]:
    """The figures that `write_figures` writes, in its order."""
    more = [one.name for one in report.more_statistics]
    for model in report.models():
        for data in report.data_sets():
            for statistic in (*CURVE_STATISTICS, *more):
                yield from _curves(report, model, data, statistic, y_limits)
            yield from _relative_differences(report, model, data)
        yield from _mad(report, model)
        yield from _length(report, model)
    yield from _similarities(report)


def _stem(name: str) -> str:
    try:
        return file_stem(name)[:_LONGEST_STEM]
    except UserError:
        return "unnamed"


def _settings(report: Report, model: str, data: str) -> list[str]:
    cells = (cell.role for cell in report.cells)
    return list(
        dict.fromkeys(role.setting for role in cells if (role.model, role.data) == (model, data))
    )


def _responses(report: Report, model: str) -> list[str]:
    found = {cell.role.response for cell in report.cells if cell.role.model == model}
    return [response for response in RESPONSES if response in found]


def _intervals(report: Report, what: str, *shown: Interval | None) -> str:
    """What bands or whiskers are, and what limits them."""
    there = [interval for interval in shown if interval is not None]
    notes = dict.fromkeys(interval.note for interval in there if interval.note)
    if there and all(np.isnan(interval.low).all() for interval in there):
        text = f"No {what.lower()}: there are no intervals."
    else:
        text = (
            f"{what}: {report.resampling.level:.0%} bootstrap intervals "
            f"({report.resampling.num_resamples} resamples of the examples)."
        )
    return text + "".join(f" {note[0].upper()}{note[1:]}." for note in notes)


def _curves(
    report: Report, model: str, data: str, statistic: str, y_limits: YLimits
) -> Iterator[PlannedFigure]:
    about = report.statistics[statistic]
    rows, shown = [], []
    for response in _responses(report, model):
        row = []
        for setting in _settings(report, model, data):
            role = Role(model, data, setting, response)
            found = report.find(role)
            if found is None:
                row.append(Curves(role.within, why="no run"))
            elif statistic not in found.descriptions:
                row.append(Curves(role.within, why="not measured"))
            else:
                description = found.descriptions[statistic]
                examples, curve_LP = description.values.examples, description.curve_LP
                aside = f"n = {examples.num_examples}"
                row.append(
                    Curves(role.within, aside, examples.layers, examples.projections, curve_LP)
                )
                shown.append(curve_LP)
        if any(panel.curve_LP is not None for panel in row):
            rows.append(row)
    if not rows:
        return
    title = f"{about.title}: {', '.join(part for part in (model, data) if part)}"
    limits = None
    if isinstance(y_limits, tuple) and statistic == NORM:
        limits = (float(y_limits[0]), float(y_limits[1]))
    caption = (
        f"{about.title} over layers, mean over examples; n is their number. {about.sentence} "
        + _intervals(report, "Bands", *shown)
        + (" Each panel has its own y axis." if y_limits == "free" else "")
    )
    yield PlannedFigure(
        ("curves", model, data, statistic),
        title,
        caption,
        lambda: curves_figure(
            rows, title=title, y_label=about.axis, limits=limits, free=y_limits == "free"
        ),
    )


def _relative_differences(report: Report, model: str, data: str) -> Iterator[PlannedFigure]:
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in report.comparisons:
        role = one.first.role
        if one.kind != "setting" and (role.model, role.data) == (model, data):
            groups.setdefault((one.kind, one.second.role.model), []).append(one)
    for (kind, other), group in groups.items():
        row, shown = [], []
        for one in group:
            if (found := one.contrasts.get(NORM)) is None:
                row.append(Curves(one.first.role.within, why=one.missing.get(NORM, "")))
                continue
            examples = found.first.examples
            aside = f"n = {examples.num_examples}, {found.second.examples.num_examples}"
            title = one.first.role.within
            row.append(Curves(title, aside, examples.layers, examples.projections, found.rd_LP))
            shown.append(found.rd_LP)
        if not shown:
            continue
        yield _rd_plan(report, (kind, model, data, other), row, shown)


def _rd_plan(
    report: Report, names: tuple[str, str, str, str], row: list[Curves], shown: list[Interval]
) -> PlannedFigure:
    kind, model, data, other = names
    whose = ", ".join(part for part in (model, data) if part)
    of = "correct to irrelevant" if kind == "response" else f"{model} to {other}"
    title = f"RD: {whose}" if kind == "response" else f"RD, {of}: {data}".rstrip(": ")
    caption = (
        f"Relative difference of the mean nuclear norm by layer, {of}: (second - first) / first; "
        "above the line the second is larger. n: examples of the two. "
        + _intervals(report, "Bands", *shown)
    )
    parts = ("rd", kind, model, data) + ((other,) if kind == "model" else ())
    return PlannedFigure(
        parts,
        title,
        caption,
        lambda: curves_figure([row], title=title, y_label="relative difference", zero_line=True),
    )


def _mad(report: Report, model: str) -> Iterator[PlannedFigure]:
    rows, shown = [], []
    for response in _responses(report, model):
        row = []
        for data in report.data_sets():
            groups: list[tuple[str, Interval | None, bool]] = []
            projections: tuple[str, ...] = ()
            for setting in _settings(report, model, data):
                found = report.find(Role(model, data, setting, response))
                mad = None
                if found is not None and NORM in found.descriptions:
                    mad = found.descriptions[NORM].mad_P
                    if mad is not None:
                        projections = found.descriptions[NORM].values.examples.projections
                        shown.append(mad)
                groups.append((setting, mad, False))
            title = ", ".join(part for part in (data, response) if part)
            there = any(group[1] is not None for group in groups)
            row.append(Points(title, projections, groups, "no MAD") if there else None)
        if any(row):
            rows.append(row)
    if not shown:
        return
    title = f"MAD: {model}"
    caption = (
        "Mean absolute difference of the nuclear norm's mean curve from layer to layer, on a "
        "logarithmic axis. "
        + _intervals(report, "Whiskers", *shown)
        + " An arrow: the interval goes on below the axis. The intervals are corrected for the "
        "noise that makes MAD larger, and may lie below their point."
    )
    yield PlannedFigure(
        ("mad", model), title, caption,
        lambda: settings_figure(rows, title=title, y_label="MAD of the nuclear norm"),
    )  # fmt: skip


def _length(report: Report, model: str) -> Iterator[PlannedFigure]:
    by_role: Mapping[tuple[Role, Role], Comparison] = {
        (one.first.role, one.second.role): one
        for one in report.comparisons
        if one.kind == "setting"
    }
    rows, shown = [], []
    for response in _responses(report, model):
        row: list[Points | None] = []
        for data in report.data_sets():
            roles = [Role(model, data, name, response) for name in _settings(report, model, data)]
            roles = [role for role in roles if report.find(role) is not None]
            one = by_role.get((roles[0], roles[-1])) if roles else None
            if one is None or NORM not in one.contrasts:
                row.append(None)
                continue
            groups = _ratios(one)
            shown += [interval for _, interval, _ in groups if interval is not None]
            what = f"{roles[0].setting} → {roles[-1].setting}"
            title = (f"{data}: " if data else "") + what
            title += f", {response}" if response != CORRECT else ""
            projections = one.contrasts[NORM].first.examples.projections
            row.append(Points(title, projections, groups))
        if any(row):
            rows.append(row)
    if not shown:
        return
    title = f"What length does: {model}"
    caption = (
        "Nuclear norm of the last setting over that of the first, as ratios of means over layers "
        "and examples; 1 is no difference. "
        + _measured(report)
        + " Matched: pairs of about the same number of response "
        "tokens alone. Regression: ratio of geometric means, with a term in log response tokens; "
        "hollow where fewer than 20 examples have lengths in common, which decides nothing. "
        + _intervals(report, "Whiskers", *shown)
    )
    yield PlannedFigure(
        ("length", model), title, caption,
        lambda: ratios_figure(rows, title=title, x_label="ratio of nuclear norms"),
    )  # fmt: skip


def _measured(report: Report) -> str:
    """What the norms are that are compared, before length is taken out."""
    words = loss_words(report.loss_name)
    if report.loss_name == RESPONSE_MEAN:
        return "Mean loss: as measured. Summed loss: norms times the number of response tokens."
    return f"As measured: norms of the gradient of the {words.phrase}."


def _ratios(one: Comparison) -> list[tuple[str, Interval | None, bool]]:
    """The ways to compare two settings, each as a ratio [P]."""
    loss, by_sum = one.first.examples.loss_name, one.summed
    summed = [("summed loss", None if by_sum is None else by_sum.ratio_P, False)]
    adjusted = None
    if one.regression is not None and np.isfinite(one.regression.adjusted_P.estimate).all():
        adjusted = one.regression.adjusted_ratio
    return [
        (loss_words(loss).measured, one.contrasts[NORM].ratio_P, False),
        *(summed if loss == RESPONSE_MEAN else []),
        (
            "matched",
            None if one.matched is None else one.matched.ratio_P,
            not matching_decides(one),
        ),
        ("regression", adjusted, not regression_decides(one)),
    ]


def _similarities(report: Report) -> Iterator[PlannedFigure]:
    measured = [cell for cell in report.cells if cell.similarity is not None]
    bound = cosine_bound(measured)
    for cell in measured:
        similarity = cell.similarity
        if similarity is None or (
            similarity.layer_cosine_PLL is None
            and similarity.adjacent_LP is None
            and similarity.partner_L2 is None
        ):
            continue
        role = cell.role
        title = f"Cosines of gradients: {', '.join((role.model, role.title))}"
        caption = (
            "Cosines between the gradients of two layers, mean over examples "
            f"(n = {similarity.num_examples}). Colours go from {-bound:g} to {bound:g} in every figure "
            "of this report; what is beyond has the colour of an end. The diagonal is 1. Partners: Q "
            "and O, K and V, in one layer. "
            + _intervals(report, "Bands", similarity.adjacent_LP, similarity.partner_L2)
        )
        yield PlannedFigure(
            ("similarity", role.model, role.data, role.setting, role.response), title, caption,
            partial(similarity_figure, similarity, title=title, bound=bound),
        )  # fmt: skip


def cosine_bound(cells: list[Cell]) -> float:
    """The largest cosine that has a colour of its own: a round number, the same for all cells."""
    sizes = []
    for cell in cells:
        if cell.similarity is None or cell.similarity.layer_cosine_PLL is None:
            continue
        cosine_PLL = cell.similarity.layer_cosine_PLL
        off = np.abs(cosine_PLL[:, ~np.eye(cosine_PLL.shape[1], dtype=bool)])
        sizes.append(off[np.isfinite(off)])
    sizes = [size for size in sizes if len(size)]
    most = float(np.quantile(np.concatenate(sizes), 0.99)) if sizes else 1.0
    return next((bound for bound in _BOUNDS if most <= bound), 1.0)
