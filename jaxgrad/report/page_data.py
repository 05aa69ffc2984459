"""What the page's script draws, as blocks of JSON: the cells, their curves, RD, similarities.

Each block is compressed by itself; the browser unpacks it when it is first needed. A curve is stored as
integers times a power of ten, its limits as distances from it: a third of the bytes of plain JSON.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.analysis import Description, Interval, Statistic, segments
from jaxgrad.analysis.curves import SEGMENTS
from jaxgrad.errors import UserError
from jaxgrad.report.comparisons import CURVE_STATISTICS, NORM, Comparison, Report
from jaxgrad.report.style import loss_words, styles_of

# Significant digits of the smallest value of a curve; larger values have more.
_DIGITS = 4
# Larger integers would not be exact in a double.
_MOST_DIGITS = 12


@dataclass(frozen=True)
class Block:
    """A part of the page's data.

    Attributes:
        name: The script looks it up by this; letters, digits, "-" and "_".
        text: gzip, then base64, which cannot end a script element.
        what: Names the block in the page's list of what is left out.
    """

    name: str
    text: str
    what: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes in the page, its element included."""
        return len(self.text) + len(self.name) + 60


def pack(content: str | bytes) -> str:
    """gzip and base64; the same content gives the same text."""
    data = content if isinstance(content, bytes) else content.encode()
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def block(name: str, content: Any, what: str = "") -> Block:
    """A block of something that JSON can write; lone surrogates become escapes."""
    return Block(name, pack(json.dumps(content, separators=(",", ":"), allow_nan=False)), what)


def rounded(value: float, digits: int = _DIGITS) -> float | None:
    """A number with a few significant digits; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def curve(values_L: np.ndarray) -> tuple[int, list[int | None]]:
    """A curve as an exponent and integers [L]: value = integer * 10 ** exponent, NaN is None.

    The smallest nonzero magnitude keeps four significant digits, as long as the largest one does not
    need more than twelve.
    """
    size = np.abs(values_L[np.isfinite(values_L) & (values_L != 0)])
    if not size.size:
        return 0, [None if not math.isfinite(v) else 0 for v in values_L.tolist()]
    exponent = max(
        math.floor(math.log10(size.min())) - _DIGITS + 1,
        math.floor(math.log10(size.max())) - _MOST_DIGITS + 1,
    )
    return exponent, _integers(values_L, exponent)


def _integers(values_L: np.ndarray, exponent: int) -> list[int | None]:
    scaled = values_L / 10.0**exponent if exponent > 0 else values_L * 10.0**-exponent
    return [round(v) if math.isfinite(v) else None for v in scaled.tolist()]


def interval_curve(estimate_L: np.ndarray, low_L: np.ndarray, high_L: np.ndarray) -> list[Any]:
    """[exponent, values, values - lows, highs - values] in one unit; without limits the first two."""
    exponent, values = curve(estimate_L)
    if not np.isfinite(low_L).any():
        return [exponent, values]
    limits = []
    for limit, sign in ((low_L, -1), (high_L, 1)):
        integers = _integers(limit, exponent)
        limits.append(
            [
                None if v is None or w is None else sign * (w - v)
                for v, w in zip(values, integers, strict=True)
            ]
        )
    return [exponent, values, *limits]


def curves_of(interval: Interval) -> list[list[Any]]:
    """An interval [L, P] as one curve a projection."""
    return [
        interval_curve(interval.estimate[:, p], interval.low[:, p], interval.high[:, p])
        for p in range(interval.estimate.shape[1])
    ]


def limits_of(interval: Interval | None) -> list[list[float | None]] | None:
    """An interval [P] as [value, low, high] of each projection."""
    if interval is None:
        return None
    rows = zip(interval.estimate, interval.low, interval.high, strict=True)
    # More digits than the page shows: rounding twice could differ from the table's number.
    return [[rounded(float(number), 7) for number in row] for row in rows]


def core_block(report: Report, embedded: Mapping[str, Any]) -> Block:
    """Names, cells and styles: what every view needs.

    Args:
        report: The report.
        embedded: Further keys of the block.
    """
    cells = []
    models, data_sets = report.models(), report.data_sets()
    settings = list(dict.fromkeys(cell.role.setting for cell in report.cells))
    responses = list(dict.fromkeys(cell.role.response for cell in report.cells))
    for curves in report.curves:
        role, examples = curves.cell.role, curves.cell.examples
        cells.append(
            {
                "model": models.index(role.model),
                "data": data_sets.index(role.data),
                "setting": settings.index(role.setting),
                "response": responses.index(role.response),
                "layers": list(examples.layers),
                "projections": list(examples.projections),
                "segments": _segments(curves.descriptions.get(NORM)),
                "used": examples.num_examples,
                "truncated": examples.num_truncated,
                "left_out": [
                    [item.example_index, item.example_id, item.reason]
                    for item in examples.left_out[:200]
                ],
                "num_left_out": len(examples.left_out),
                "missing": dict(curves.missing),
            }
        )
    words = loss_words(report.loss_name)
    content = {
        "models": models,
        "data": data_sets,
        "settings": settings,
        "responses": responses,
        "loss": {"phrase": words.phrase, "unit": words.unit},
        "statistics": {
            name: _statistic(one)
            for name, one in report.statistics.items()
            if any(name in c.descriptions for c in report.curves)
        },
        "segments": SEGMENTS,
        "projections": {
            name: {
                "title": style.title,
                "colour": style.colour,
                "dash": style.plotly_dash(),
                "symbol": style.symbol,
            }
            for name, style in styles_of(
                word for cell in report.cells for word in cell.examples.projections
            ).items()
        },
        "level": report.resampling.level,
        "cells": cells,
    }
    return block("core", content | dict(embedded))


def _statistic(one: Statistic) -> dict[str, str | bool]:
    return {
        "title": one.title,
        "axis": one.axis,
        "short": one.short,
        "definition": one.sentence,
        # An example has curves of it; of the others it has means over layers.
        "drawn": one.name in CURVE_STATISTICS,
    }


def _segments(description: Description | None) -> list[list[int]] | None:
    if description is None or description.segment_mad_3P is None:
        return None
    try:
        return [list(segment) for segment in segments(len(description.values.examples.layers))]
    except UserError:
        return None


def curve_blocks(report: Report) -> list[Block]:
    """The mean curves with their MAD: one block a statistic, in it one entry a cell."""
    blocks = []
    for name, statistic in report.statistics.items():
        content = {}
        for place, curves in enumerate(report.curves):
            found = curves.descriptions.get(name)
            if found is None:
                continue
            content[place] = {
                "curves": curves_of(found.curve_LP),
                "mad": limits_of(found.mad_P),
                "used": found.values.examples.num_examples,
                "note": found.note,
            }
        if content:
            what = f"the curves of: {statistic.title}"
            blocks.append(block(f"curves-{name}", content, what))
    return blocks


def rd_blocks(report: Report) -> list[Block]:
    """RD of the nuclear norm by layer, one block a kind of comparison."""
    titles = {
        "response": "correct and irrelevant responses",
        "setting": "settings",
        "model": "models",
    }
    places = {cell.role: place for place, cell in enumerate(report.cells)}
    blocks = []
    for kind, title in titles.items():
        content = [
            _rd(comparison, places[comparison.first.role], places[comparison.second.role])
            for comparison in report.comparisons
            if comparison.kind == kind and NORM in comparison.contrasts
        ]
        if content:
            what = f"the relative differences by layer between {title}"
            blocks.append(block(f"rd-{kind}", content, what))
    return blocks


def _rd(comparison: Comparison, first: int, second: int) -> dict[str, Any]:
    contrast = comparison.contrasts[NORM]
    layers = contrast.first.examples.layers
    return {
        "first": first,
        "second": second,
        "title": comparison.title,
        "curves": curves_of(contrast.rd_LP),
        "mean": limits_of(contrast.mean_absolute_rd_P),
        "largest": [[layers[at] for at in places] for places in contrast.largest.T.tolist()],
    }


def similarity_blocks(report: Report) -> list[Block]:
    """Mean cosines between layers, one block a cell: the upper triangles, in units of 0.001."""
    blocks = []
    for place, cell in enumerate(report.cells):
        found = cell.similarity
        if found is None or found.layer_cosine_PLL is None:
            continue
        upper = np.triu_indices(len(found.layers), 1)
        content = {
            "layers": list(found.layers),
            "projections": list(found.projections),
            "used": found.num_examples,
            "undefined": found.num_undefined,
            "upper": [
                _integers(matrix[upper], -3) for matrix in np.asarray(found.layer_cosine_PLL)
            ],
        }
        what = f"the similarity matrices of {cell.role.model}, {cell.role.title}"
        blocks.append(block(f"similarity-{place}", content, what))
    return blocks


def fitting(blocks: Sequence[Block], room: int) -> tuple[list[Block], list[Block]]:
    """The blocks that fit into `room` bytes one after the other, and those that do not."""
    inside: list[Block] = []
    outside: list[Block] = []
    for item in blocks:
        if item.num_bytes <= room:
            room -= item.num_bytes
            inside.append(item)
        else:
            outside.append(item)
    return inside, outside
