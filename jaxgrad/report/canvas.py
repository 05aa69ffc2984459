"""Matplotlib figures without pyplot: grids of panels, untrusted text, files with reproducible bytes.

Make and save a figure inside `with drawing():`. It starts from Matplotlib's own defaults, so that a user's
matplotlibrc changes nothing, and restores the settings afterwards.
"""

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from jaxgrad.report.style import GRID, INK, MUTED, Style

PNG_DPI = 150
MAX_COLUMNS = 4
# Inches.
_HEAD = 0.4
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.5,
    "figure.titlesize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "lines.scale_dashes": True,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "legend.columnspacing": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # A dollar sign in the name of a model or data set starts no formula.
    "text.parse_math": False,
    "text.usetex": False,
    # Text stays text: the files are small and searchable.
    "svg.fonttype": "none",
    # The same figure gets the same ids inside the file.
    "svg.hashsalt": "jaxgrad",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Sets Matplotlib up for figures; restores its settings afterwards."""
    defaults = {
        name: value for name, value in matplotlib.rcParamsDefault.items() if "backend" not in name
    }
    with matplotlib.rc_context(defaults), warnings.catch_warnings():
        # A name in a script that DejaVu Sans lacks is right in the SVG and boxes in the PNG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings(
            "ignore", message="Matplotlib currently does not support .* natively"
        )
        matplotlib.rcParams.update(_SETTINGS)
        yield


def shortened(text: str, limit: int = 40) -> str:
    """Untrusted text for a figure: one line without control characters; a long one loses its middle.

    Args:
        text: Any.
        limit: Most characters of the result, 3 or more.
    """
    # Categories C*: control, format (writing direction), surrogates, unassigned. XML allows few.
    kept = (" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    line = " ".join("".join(kept).split())
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2 + (limit - 1) % 2
    return f"{line[:head].rstrip()}…{line[len(line) - (limit - 1 - head) :].lstrip()}"


def grid(
    rows: int,
    columns: int,
    *,
    title: str,
    width: float = 1.75,
    height: float = 1.45,
    share_x: bool = True,
    share_y: bool = True,
    left: float = 0.6,
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of empty panels.

    Args:
        rows: Panels one above the other.
        columns: Panels side by side.
        title: The figure's, untrusted.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        share_x: All panels have one range of x.
        share_y: All panels have one range of y.
        left: Room for the labels at the left, in inches.

    Returns:
        The figure, and its axes [rows, columns].
    """
    figure = blank(left + width * columns, 0.8 + height * rows, title)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    return figure, axes


def blank(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title, untrusted.

    Args:
        width: In inches; made at least as large as title and legend need.
        height: In inches.
        title: At its upper left.
    """
    width = max(3.4, width)
    # Above the panels: one line of title, one of legend.
    panels = (0.012, 0.005, 0.98, 0.995 - _HEAD / height)
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.03, wspace=0.02, hspace=0.03, rect=panels)
    figure = Figure(figsize=(width, height), layout=layout)
    title = shortened(title, int(width * 12))
    figure.text(0.012, 1 - 0.05 / height, title, va="top", weight="bold", size=8.5)
    return figure


def head(axes: Axes, title: str, aside: str = "") -> None:
    """Sets a panel's title, untrusted, and a few muted words inside the panel."""
    root = axes.figure.get_figure(root=True)
    spec = axes.get_gridspec()
    assert root is not None and spec is not None
    room = root.get_figwidth() / spec.ncols * 15.5
    axes.set_title(shortened(title, max(12, int(room) - 3)), loc="left")
    if aside:
        axes.text(
            0.985, 0.975, aside, transform=axes.transAxes, ha="right", va="top", color=MUTED,
            fontsize=6.5,
        )  # fmt: skip


def absent(axes: Axes, why: str) -> None:
    """Writes into an empty panel why it is empty."""
    axes.text(
        0.5, 0.5, shortened(why, 60), transform=axes.transAxes, ha="center", va="center",
        color=MUTED, fontsize=6.5, wrap=True,
    )  # fmt: skip


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Whole numbers on the x axis, with room at both ends."""
    room = max(0.5, 0.03 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - room, layers[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def log_axis(axis: Any) -> None:
    """Labels a logarithmic axis with plain numbers, not powers of ten; a short axis gets more of them."""
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    steps = (
        (1, 1.5, 2, 3, 5, 7)
        if decades < 0.6
        else (1, 2, 3, 5)
        if decades < 1.2
        else (1, 2, 5)
        if decades < 2.2
        else (1,)
    )
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend(
    figure: Figure, styles: Sequence[Style], more: Sequence[Line2D] = (), *, lines: bool = True
) -> None:
    """The figure's one legend, under its title.

    Args:
        figure: Where.
        styles: An entry each.
        more: Further entries, with their labels.
        lines: The marks stand on lines.
    """
    handles = [
        Line2D([], [], color=style.colour, ls=style.linestyle if lines else "none", marker=style.marker,
               markeredgewidth=0, label=style.title)
        for style in styles
    ]  # fmt: skip
    handles += more
    height = figure.get_figheight()
    figure.legend(
        handles=handles,
        handlelength=3.0 if lines else 1.0,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.2 / height),
        ncols=len(handles),
        borderaxespad=0.2,
        borderpad=0.1,
    )


def save(figure: Figure, directory: Path, name: str, title: str) -> tuple[Path, Path]:
    """Writes NAME.svg and NAME.png; the same figure gives the same bytes.

    Args:
        figure: Made, as it is saved, within `drawing`.
        directory: That exists.
        name: Of the files, without suffix.
        title: Goes into both files' metadata, untrusted.

    Returns:
        The two paths.
    """
    svg, png = directory / f"{name}.svg", directory / f"{name}.png"
    title = shortened(title, 200)
    _place(figure)
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Title": title})
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Title": title})
    return svg, png


def _place(figure: Figure) -> None:
    """Lays the panels out, once for both files: the layout takes most of the time.

    The positions are rounded. Their last bits differ from run to run (the solver orders its terms by memory
    address), and an SVG's clip ids are hashes of all bits.
    """
    engine = figure.get_layout_engine()
    assert engine is not None
    figure.set_dpi(72)  # as in an SVG
    engine.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(left, 7), round(bottom, 7), round(width, 7), round(height, 7)))
