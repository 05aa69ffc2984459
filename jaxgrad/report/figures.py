"""Every figure of a study as SVG and PNG, in the arrangement of the paper.

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
from jaxgrad.report.comparisons import NORM, SUM_LOSS, Comparison, Study
from jaxgrad.report.panels import (
    Curves,
    Points,
    curves_figure,
    ratios_figure,
    settings_figure,
    similarity_figure,
)
from jaxgrad.report.style import STATISTIC_NAMES
from jaxgrad.report.verdicts import matching_decides, regression_decides

YLimits = Literal["shared", "free"] | tuple[float, float]

CURVE_STATISTICS = (NORM, "sigma_ratio", "effective_rank")
# Reach of the colours of cosines: the smallest that holds 99 % of those beside the diagonals.
_BOUNDS = (0.1, 0.2, 0.5, 1.0)
_LONGEST_STEM = 60


@dataclass(frozen=True)
class FigureFile:
    """A figure that was written.

    Attributes:
        name: Of its files, without their ends; no two of a study are equal.
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
class Plan:
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
    study: Study, directory: Path, *, y_limits: YLimits = "shared", progress: bool = False
) -> list[FigureFile]:
    """Writes all figures for which the study has the data; the same study gives the same bytes.

    Args:
        study: What to show.
        directory: Is made where it is not there; files of the same names are replaced.
        y_limits: Of the curves: "shared" by all panels of a figure (so does the paper), "free", or
            (low, high) of the nuclear norm, other statistics' being shared then.
        progress: Show a bar on stderr.

    Raises:
        UserError: Limits that are none.
    """
    if not isinstance(y_limits, str):
        low, high = y_limits
        if not (np.isfinite([low, high]).all() and low < high):
            raise UserError(f"The y limits are {low}, {high}: give a smaller and a larger number.")
    elif y_limits not in ("shared", "free"):
        raise UserError(f"The y limits are {y_limits!r}: give shared, free or two numbers.")
    directory.mkdir(parents=True, exist_ok=True)
    written, taken = [], set()
    plans = list(plan_figures(study, y_limits))
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


def plan_figures(study: Study, y_limits: YLimits = "shared") -> Iterator[Plan]:
    """The figures that `write_figures` writes, in its order."""
    for model in study.models():
        for data in study.data_sets():
            for statistic in CURVE_STATISTICS:
                yield from _curves(study, model, data, statistic, y_limits)
            yield from _relative_differences(study, model, data)
        yield from _mad(study, model)
        yield from _length(study, model)
    yield from _similarities(study)


def _stem(name: str) -> str:
    try:
        return file_stem(name)[:_LONGEST_STEM]
    except UserError:
        return "unnamed"


def _settings(study: Study, model: str, data: str) -> list[str]:
    cells = (cell.role for cell in study.cells)
    return list(
        dict.fromkeys(role.setting for role in cells if (role.model, role.data) == (model, data))
    )


def _responses(study: Study, model: str) -> list[str]:
    found = {cell.role.response for cell in study.cells if cell.role.model == model}
    return [response for response in RESPONSES if response in found]


def _intervals(study: Study, what: str, *shown: Interval | None) -> str:
    """What bands or whiskers are, and what is said of them."""
    there = [interval for interval in shown if interval is not None]
    notes = dict.fromkeys(interval.note for interval in there if interval.note)
    if there and all(np.isnan(interval.low).all() for interval in there):
        text = f"No {what.lower()}: there are no intervals."
    else:
        text = (
            f"{what}: {study.resampling.level:.0%} bootstrap intervals "
            f"({study.resampling.num_resamples} resamples of the examples)."
        )
    return text + "".join(f" {note[0].upper()}{note[1:]}." for note in notes)


def _curves(
    study: Study, model: str, data: str, statistic: str, y_limits: YLimits
) -> Iterator[Plan]:
    name = STATISTIC_NAMES[statistic]
    rows, shown = [], []
    for response in _responses(study, model):
        row = []
        for setting in _settings(study, model, data):
            role = Role(model, data, setting, response)
            found = study.find(role)
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
    title = f"{name.title}: {', '.join(part for part in (model, data) if part)}"
    limits = None
    if isinstance(y_limits, tuple) and statistic == NORM:
        limits = (float(y_limits[0]), float(y_limits[1]))
    caption = (
        f"{name.title} over layers, mean over examples; n is their number. {name.definition} "
        + _intervals(study, "Bands", *shown)
        + (" Each panel has its own y axis." if y_limits == "free" else "")
    )
    yield Plan(
        ("curves", model, data, statistic),
        title,
        caption,
        lambda: curves_figure(
            rows, title=title, y_label=name.axis, limits=limits, free=y_limits == "free"
        ),
    )


def _relative_differences(study: Study, model: str, data: str) -> Iterator[Plan]:
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in study.comparisons:
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
        yield _rd_plan(study, (kind, model, data, other), row, shown)


def _rd_plan(
    study: Study, names: tuple[str, str, str, str], row: list[Curves], shown: list[Interval]
) -> Plan:
    kind, model, data, other = names
    whose = ", ".join(part for part in (model, data) if part)
    of = "correct to irrelevant" if kind == "response" else f"{model} to {other}"
    title = f"RD: {whose}" if kind == "response" else f"RD, {of}: {data}".rstrip(": ")
    caption = (
        f"Relative difference of the mean nuclear norm by layer, {of}: (second - first) / first; "
        "above the line the second is larger. n: examples of the two. "
        + _intervals(study, "Bands", *shown)
    )
    parts = ("rd", kind, model, data) + ((other,) if kind == "model" else ())
    return Plan(
        parts,
        title,
        caption,
        lambda: curves_figure([row], title=title, y_label="relative difference", zero_line=True),
    )


def _mad(study: Study, model: str) -> Iterator[Plan]:
    rows, shown = [], []
    for response in _responses(study, model):
        row = []
        for data in study.data_sets():
            groups: list[tuple[str, Interval | None, bool]] = []
            projections: tuple[str, ...] = ()
            for setting in _settings(study, model, data):
                found = study.find(Role(model, data, setting, response))
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
        + _intervals(study, "Whiskers", *shown)
        + " An arrow: the interval goes on below the axis. The intervals are corrected for the "
        "noise that makes MAD larger, and may lie below their point."
    )
    yield Plan(
        ("mad", model), title, caption,
        lambda: settings_figure(rows, title=title, y_label="MAD of the nuclear norm"),
    )  # fmt: skip


def _length(study: Study, model: str) -> Iterator[Plan]:
    by_role: Mapping[tuple[Role, Role], Comparison] = {
        (one.first.role, one.second.role): one for one in study.comparisons if one.kind == "setting"
    }
    rows, shown = [], []
    for response in _responses(study, model):
        row: list[Points | None] = []
        for data in study.data_sets():
            roles = [Role(model, data, name, response) for name in _settings(study, model, data)]
            roles = [role for role in roles if study.find(role) is not None]
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
        "and examples; 1 is no difference. Mean loss: as measured. Summed loss: norms times the "
        "number of response tokens. Matched: pairs of about the same number of response "
        "tokens alone. Regression: ratio of geometric means, with a term in log response tokens; "
        "hollow where fewer than 20 examples have lengths in common, which decides nothing. "
        + _intervals(study, "Whiskers", *shown)
    )
    yield Plan(
        ("length", model), title, caption,
        lambda: ratios_figure(rows, title=title, x_label="ratio of nuclear norms"),
    )  # fmt: skip


def _ratios(one: Comparison) -> list[tuple[str, Interval | None, bool]]:
    """The four ways to compare two settings, each as a ratio [P]."""
    by_sum = one.contrasts.get(SUM_LOSS)
    adjusted = None
    if one.regression is not None and np.isfinite(one.regression.adjusted_P.estimate).all():
        adjusted = one.regression.adjusted_ratio
    return [
        ("mean loss", one.contrasts[NORM].ratio_P, False),
        ("summed loss", None if by_sum is None else by_sum.ratio_P, False),
        (
            "matched",
            None if one.matched is None else one.matched.ratio_P,
            not matching_decides(one),
        ),
        ("regression", adjusted, not regression_decides(one)),
    ]


def _similarities(study: Study) -> Iterator[Plan]:
    measured = [cell for cell in study.cells if cell.similarity is not None]
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
            f"(n = {similarity.num_examples}). Colours from {-bound:g} to {bound:g} in every figure "
            "of this study, what is beyond as their ends; the diagonal is 1. Partners: Q and O, "
            "K and V, in one layer. "
            + _intervals(study, "Bands", similarity.adjacent_LP, similarity.partner_L2)
        )
        yield Plan(
            ("similarity", role.model, role.data, role.setting, role.response), title, caption,
            partial(similarity_figure, similarity, title=title, bound=bound),
        )  # fmt: skip


def cosine_bound(cells: list[Cell]) -> float:
    """How far the colours reach: one of a few round numbers, for all cells together."""
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
