"""The figures: each function draws one from intervals that are given to it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D

from jaxgrad.analysis import Interval
from jaxgrad.analysis.similarity import Similarity
from jaxgrad.projections import PARTNER_PAIRS
from jaxgrad.report.canvas import (
    MAX_COLUMNS,
    absent,
    blank,
    grid,
    head,
    layer_axis,
    legend,
    log_axis,
    shortened,
)
from jaxgrad.report.style import GRID, INK, MUTED, Style, style_of, styles_of

# From dark blue through grey to light yellow: negative and positive differ in lightness as well.
COSINE_COLOURS = "cividis"
_MARKS = 7
_BAND = 0.16
_FAINT_BAND = 0.09


class Curves(NamedTuple):
    """A panel over layers.

    Attributes:
        title: The panel's, untrusted.
        aside: A few words beside it: the number of examples.
        layers: Measured layers.
        projections: Names of the curves.
        curve_LP: With its limits; None where there is nothing to show.
        why: What stands there instead.
    """

    title: str
    aside: str = ""
    layers: Sequence[int] = ()
    projections: Sequence[str] = ()
    curve_LP: Interval | None = None
    why: str = ""


class Points(NamedTuple):
    """A panel of points with whiskers.

    Attributes:
        title: The panel's, untrusted.
        projections: Names of the points within a group.
        groups: A group's label, untrusted, its interval [P] or None, and whether it is hollow.
        why: What stands where a group has no interval.
    """

    title: str
    projections: Sequence[str]
    groups: Sequence[tuple[str, Interval | None, bool]]
    why: str = "not available"


Panel = TypeVar("Panel")


def folded(rows: Sequence[Sequence[Panel | None]]) -> list[list[Panel | None]]:
    """Rows of panels, broken into several where a row is wider than a page."""
    longest = max(len(row) for row in rows)
    # Lines of about equal length: 5 panels become 3 + 2.
    columns = -(-longest // -(-longest // MAX_COLUMNS))
    lines: list[list[Panel | None]] = []
    for start in range(0, longest, columns):
        for row in rows:
            part: list[Panel | None] = list(row[start : start + columns])
            lines.append(part + [None] * (columns - len(part)))
    return lines


def curves_figure(
    rows: Sequence[Sequence[Curves]],
    *,
    title: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
    free: bool = False,
    zero_line: bool = False,
) -> Figure:
    """Panels of curves over layers with their bands.

    Args:
        rows: Of panels, equally many in each.
        title: The figure's, untrusted.
        y_label: One for all panels.
        limits: Of the y axis. By default the range of the data, from 0 where there is no `zero_line`.
        free: Each panel has its own.
        zero_line: Draw one: the values have a sign.
    """
    places = folded(rows)
    columns = len(places[0])
    figure, axes = grid(
        len(places), columns, title=title, share_x=False, share_y=not free,
        width=2.6 if columns == 1 else 2.1 if columns < MAX_COLUMNS else 1.75,
    )  # fmt: skip
    shown = [panel for row in places for panel in row if panel is not None]
    shared = limits or _range([p.curve_LP for p in shown if p.curve_LP is not None], zero_line)
    for i, j, ax, panel in _filled(axes, places):
        head(ax, panel.title, panel.aside)
        if panel.curve_LP is None:
            absent(ax, panel.why)
            ax.xaxis.set_visible(False)
        else:
            draw_curves(
                ax,
                panel.layers,
                panel.curve_LP,
                [style_of(p) for p in panel.projections],
                # Signed curves overlap.
                band=_FAINT_BAND if zero_line else _BAND,
            )
        own = [panel.curve_LP] if panel.curve_LP is not None else []
        ax.set_ylim(_range(own, zero_line) if free else shared)
        if zero_line:
            ax.axhline(0, color=INK, lw=0.7, zorder=1.5)
        below = places[i + 1][j] if i + 1 < len(places) else None
        if below is None and panel.curve_LP is not None:
            ax.set_xlabel("layer")
    figure.supylabel(y_label, fontsize=7.5)
    legend(figure, _styles(name for panel in shown for name in panel.projections))
    return figure


def draw_curves(
    ax: Axes,
    layers: Sequence[int],
    interval: Interval,
    styles: Sequence[Style],
    band: float = _BAND,
) -> None:
    """Draws curves [L, P] over the layers; no two have a mark at the same layer."""
    every = max(1, len(layers) // _MARKS)
    for p, style in enumerate(styles):
        if np.isnan(interval.estimate[:, p]).all():
            continue
        ax.fill_between(
            layers, interval.low[:, p], interval.high[:, p], color=style.colour, alpha=band, lw=0
        )
        ax.plot(
            layers, interval.estimate[:, p], color=style.colour, ls=style.linestyle,
            marker=style.marker, markevery=(p * every // len(styles), every), markeredgewidth=0,
            label=style.title,
        )  # fmt: skip
    layer_axis(ax, layers)


def settings_figure(rows: Sequence[Sequence[Points | None]], *, title: str, y_label: str) -> Figure:
    """Panels of points over settings, on one logarithmic axis.

    Args:
        rows: Of panels, equally many in each, None for none.
        title: The figure's, untrusted.
        y_label: One for all panels.
    """
    panels = [panel for row in rows for panel in row if panel is not None]
    most = max(len(panel.groups) for panel in panels)
    places = folded(rows)
    figure, axes = grid(
        len(places), len(places[0]), title=title, share_x=False, share_y=True,
        width=min(2.6, max(1.5, 0.35 + 0.55 * most)), height=1.6,
    )  # fmt: skip
    low, high = _log_range([group[1] for panel in panels for group in panel.groups])
    for _, _, ax, panel in _filled(axes, places):
        head(ax, panel.title)
        _points(ax, panel, low, horizontal=False)
        names = [shortened(group[0], 14) for group in panel.groups]
        ax.set_xticks(range(len(names)), names)
        ax.tick_params(axis="x", length=0)
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.grid(visible=False, axis="x")
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        log_axis(ax.yaxis)
    figure.supylabel(y_label, fontsize=7.5)
    legend(figure, _styles(n for panel in panels for n in panel.projections), lines=False)
    return figure


def ratios_figure(rows: Sequence[Sequence[Points | None]], *, title: str, x_label: str) -> Figure:
    """Panels of ratios, one group below the other, on a logarithmic axis with a line at 1.

    Args:
        rows: Of panels, equally many in each, None for none; all with the same groups.
        title: The figure's, untrusted.
        x_label: One for all panels.
    """
    panels = [panel for row in rows for panel in row if panel is not None]
    labels = [shortened(group[0], 24) for group in panels[0].groups]
    places = folded(rows)
    columns = len(places[0])
    figure, axes = grid(
        len(places), columns, title=title, share_x=True, share_y=True, left=0.9,
        width=2.6 if columns == 1 else 2.0 if columns < MAX_COLUMNS else 1.6,
        height=0.4 + 0.4 * len(labels),
    )  # fmt: skip
    low, high = _log_range([group[1] for panel in panels for group in panel.groups])
    low, high = min(low, 0.8), max(high, 1.25)
    for i, j, ax, panel in _filled(axes, places):
        head(ax, panel.title)
        ax.axvline(1, color=INK, lw=0.7, zorder=1.5)
        for y in range(1, len(labels)):
            ax.axhline(y - 0.5, color=GRID, lw=0.5, zorder=1)
        _points(ax, panel, low, horizontal=True)
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        log_axis(ax.xaxis)
        if i + 1 == len(places) or places[i + 1][j] is None:
            ax.tick_params(axis="x", labelbottom=True)
    figure.supxlabel(x_label, fontsize=7.5)
    hollow = any(group[2] for panel in panels for group in panel.groups)
    more = [Line2D([], [], ls="none", marker="o", mfc="white", mec=MUTED, label="decides nothing")]
    names = [name for panel in panels for name in panel.projections]
    legend(figure, _styles(names), more if hollow else [], lines=False)
    return figure


def similarity_figure(similarity: Similarity, *, title: str, bound: float) -> Figure:
    """Mean cosines between layers as maps; those of neighbours and partners as curves.

    Args:
        similarity: Of one run.
        title: The figure's, untrusted.
        bound: The colours reach from minus to plus this.
    """
    layers = similarity.layers
    maps = _maps(similarity)
    of_partners = similarity.partner_L2 is not None
    of_neighbours = similarity.adjacent_LP is not None
    curves = of_neighbours + of_partners
    columns = max(2, len(maps))
    height = 0.8 + (1.25 + 5.2 / columns if maps else 0) * 0.75 + (1.5 if curves else 0)
    figure = blank(6.9, height, title)
    parts = figure.add_gridspec(
        bool(maps) + bool(curves), 1, height_ratios=[1.1] * bool(maps) + [1.0] * bool(curves)
    )
    if maps:
        _draw_maps(figure, parts[0], maps, layers, bound)
    if curves:
        _draw_cosines(figure, parts[-1], similarity)
    legend(figure, _styles(similarity.projections))
    return figure


def _maps(similarity: Similarity) -> list[tuple[str, np.ndarray]]:
    if similarity.layer_cosine_PLL is None:
        return []
    pairs = zip(similarity.projections, similarity.layer_cosine_PLL, strict=True)
    return [(name, cosine_LL) for name, cosine_LL in pairs if not np.isnan(cosine_LL).all()]


def _draw_maps(
    figure: Figure,
    spec: SubplotSpec,
    maps: Sequence[tuple[str, np.ndarray]],
    layers: Sequence[int],
    bound: float,
) -> None:
    drawn = []
    columns = spec.subgridspec(1, len(maps))
    for j, (name, cosine_LL) in enumerate(maps):
        ax = figure.add_subplot(columns[0, j])
        image = ax.imshow(
            cosine_LL, cmap=COSINE_COLOURS, vmin=-bound, vmax=bound, origin="lower",
            interpolation="none",
        )  # fmt: skip
        head(ax, style_of(name).title)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        places = np.unique(np.linspace(0, len(layers) - 1, 4).round().astype(int))
        ax.set_xticks(places, [str(layers[at]) for at in places])
        ax.set_yticks(places, [str(layers[at]) if j == 0 else "" for at in places])
        ax.set_xlabel("layer")
        if j == 0:
            ax.set_ylabel("layer")
        drawn.append(ax)
    bar = figure.colorbar(
        image, ax=drawn, extend="neither" if bound == 1 else "both", fraction=0.05, pad=0.01,
        aspect=16, shrink=0.85, label="mean cosine", ticks=[-bound, 0, bound],
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in (-bound, 0, bound)])


def _draw_cosines(figure: Figure, spec: SubplotSpec, similarity: Similarity) -> None:
    layers = similarity.layers
    parts = []
    if similarity.adjacent_LP is not None:
        styles = [style_of(name) for name in similarity.projections]
        parts.append(("Neighbours: layers i, i + 1", layers[:-1], similarity.adjacent_LP, styles))
    if similarity.partner_L2 is not None:
        # A pair is drawn as its second partner: V and O, whose gradients share the values' path.
        pairs = [style_of(other) for _, other in PARTNER_PAIRS]
        parts.append(("Partners in a layer", layers, similarity.partner_L2, pairs))
    grid_spec = spec.subgridspec(1, len(parts))
    for j, (title, at, interval, styles) in enumerate(parts):
        ax = figure.add_subplot(grid_spec[0, j])
        draw_curves(ax, at, interval, styles)
        ax.set_ylim(_range([interval], signed=True))
        ax.axhline(0, color=INK, lw=0.7, zorder=1.5)
        head(ax, title, f"n = {similarity.num_examples}")
        ax.set_xlabel("layer i" if at is not layers else "layer")
        if j == 0:
            ax.set_ylabel("mean cosine")
        if at is layers:
            for line in ax.get_lines():
                names = {
                    style_of(b).title: f"{style_of(a).title} with {style_of(b).title}"
                    for a, b in PARTNER_PAIRS
                }
                if str(line.get_label()) in names:
                    line.set_label(names[str(line.get_label())])
            ax.legend(loc="best", handlelength=2.4, borderaxespad=0.1)


def _points(ax: Axes, panel: Points, floor: float, *, horizontal: bool) -> None:
    """Draws a group's points side by side. A whisker that goes below the floor ends there in an arrow."""
    count = len(panel.projections)
    for g, (_, interval, hollow) in enumerate(panel.groups):
        if interval is None:
            x, y = (0.5, g) if horizontal else (g, 0.5)
            across = ax.get_yaxis_transform() if horizontal else ax.get_xaxis_transform()
            ax.text(
                x, y, shortened(panel.why, 40), transform=across, color=MUTED, fontsize=6.5,
                ha="center", va="center",
            )  # fmt: skip
            continue
        for p, name in enumerate(panel.projections):
            style = style_of(name)
            place = g + (p - (count - 1) / 2) * 0.66 / max(count, 3)
            ends = np.array([interval.low[p], interval.high[p]])
            reaches = ends[0] < floor
            ends = np.maximum(ends, floor)
            if np.isfinite(ends).all():
                xy = (ends, [place] * 2) if horizontal else ([place] * 2, ends)
                ax.plot(*xy, color=style.colour, lw=1.1, solid_capstyle="butt", zorder=2)
                if reaches:
                    at = (floor, place) if horizontal else (place, floor)
                    ax.plot(*at, marker="<" if horizontal else "v", color=style.colour, ms=3,
                            mew=0, clip_on=False, zorder=2)  # fmt: skip
            at = (interval.estimate[p], place) if horizontal else (place, interval.estimate[p])
            ax.plot(
                *at, ls="none", marker=style.marker, ms=4.2, mec=style.colour, mew=0.8,
                mfc="white" if hollow else style.colour, zorder=3, label=style.title,
            )  # fmt: skip


def _styles(names: Iterable[str]) -> list[Style]:
    return list(styles_of(names).values())


def _range(intervals: Sequence[Interval], signed: bool) -> tuple[float, float]:
    values = [part.ravel() for i in intervals for part in (i.estimate, i.low, i.high)]
    known = np.concatenate([*values, [0.0]])
    known = known[np.isfinite(known)]
    low, high = float(known.min()), float(known.max())
    if low == high:
        return (-1.0, 1.0) if signed else (0.0, 1.0)
    room = 0.06 * (high - low)
    return (low - room if signed or low < 0 else 0.0), high + room


def _log_range(intervals: Sequence[Interval | None]) -> tuple[float, float]:
    """The range of the estimates, and of those limits that are not far below all of them."""
    there = [interval for interval in intervals if interval is not None]
    estimates = np.concatenate([np.ravel(i.estimate) for i in there] or [np.empty(0)])
    limits = np.concatenate(
        [np.ravel(part) for i in there for part in (i.low, i.high)] or [np.empty(0)]
    )
    estimates = estimates[np.isfinite(estimates) & (estimates > 0)]
    if not len(estimates):
        return 0.1, 10.0
    limits = limits[np.isfinite(limits) & (limits > estimates.min() / 4)]
    known = np.concatenate([estimates, limits])
    return float(known.min()) / 1.2, float(known.max()) * 1.2


def _filled(
    axes: np.ndarray, places: Sequence[Sequence[Panel | None]]
) -> Iterator[tuple[int, int, Axes, Panel]]:
    """Row, column, axes and panel of every place that has one; the others are hidden."""
    for i, j in np.ndindex(axes.shape):
        panel, ax = places[i][j], cast(Axes, axes[i, j])
        if panel is None:
            ax.set_visible(False)
        else:
            yield i, j, ax, panel
