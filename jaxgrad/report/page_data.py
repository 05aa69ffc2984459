"""What the page's script draws, as blocks of JSON: the cells, their curves, RD, similarities.

A block is compressed alone and unpacked in the browser when it is first needed. Curves are integers
times a power of ten, their limits are distances in the same unit: a third of the bytes of plain JSON.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.analysis import STATISTICS, Description, Interval, segments
from jaxgrad.errors import UserError
from jaxgrad.report.comparisons import NORM, Comparison, Study
from jaxgrad.report.style import PROJECTION_STYLE, STATISTIC_NAMES

# Significant digits of the smallest value of a curve; larger ones have more.
_DIGITS = 4
# Beyond it integers would no longer be exact in a double.
_MOST_DIGITS = 12


@dataclass(frozen=True)
class Block:
    """A part of the page's data.

    Attributes:
        name: The script looks it up by this; letters, digits, "-" and "_".
        text: gzip, then base64: no character of it can end a script element.
        what: What the page says is left out where the block does not fit.
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
    # More digits than are shown: a number rounded twice may differ from its table's.
    return [[rounded(float(number), 7) for number in row] for row in rows]


def core_block(study: Study, embedded: Mapping[str, Any]) -> Block:
    """Names, cells and styles: what every view needs.

    Args:
        study: The study.
        embedded: Added to it as it is.
    """
    cells = []
    models, data_sets = study.models(), study.data_sets()
    settings = list(dict.fromkeys(cell.role.setting for cell in study.cells))
    responses = list(dict.fromkeys(cell.role.response for cell in study.cells))
    for curves in study.curves:
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
    names = [name for name in STATISTICS if any(name in c.descriptions for c in study.curves)]
    content = {
        "models": models,
        "data": data_sets,
        "settings": settings,
        "responses": responses,
        "statistics": {name: _statistic(name) for name in names},
        "projections": {
            name: {
                "title": style.title,
                "colour": style.colour,
                "dash": style.plotly_dash(),
                "symbol": style.symbol,
            }
            for name, style in PROJECTION_STYLE.items()
            if any(name in cell.examples.projections for cell in study.cells)
        },
        "level": study.resampling.level,
        "cells": cells,
    }
    return block("core", content | dict(embedded))


def _statistic(name: str) -> dict[str, str]:
    known = STATISTIC_NAMES.get(name)
    title, axis, definition = known if known else (name, name, "")
    return {"title": title, "axis": axis, "definition": definition}


def _segments(description: Description | None) -> list[list[int]] | None:
    if description is None or description.segment_mad_3P is None:
        return None
    try:
        return [list(segment) for segment in segments(len(description.values.examples.layers))]
    except UserError:
        return None


def curve_blocks(study: Study) -> list[Block]:
    """The mean curves with their MAD, one block a statistic: cell -> what is drawn."""
    blocks = []
    for name in STATISTICS:
        content = {}
        for place, curves in enumerate(study.curves):
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
            title = _statistic(name)["title"]
            blocks.append(block(f"curves-{name}", content, f"the curves of: {title}"))
    return blocks


def rd_blocks(study: Study) -> list[Block]:
    """RD of the nuclear norm by layer, one block a kind of comparison."""
    titles = {
        "response": "correct and irrelevant responses",
        "setting": "settings",
        "model": "models",
    }
    places = {cell.role: place for place, cell in enumerate(study.cells)}
    blocks = []
    for kind, title in titles.items():
        content = [
            _rd(comparison, places[comparison.first.role], places[comparison.second.role])
            for comparison in study.comparisons
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


def similarity_blocks(study: Study) -> list[Block]:
    """Mean cosines between layers, one block a cell: the upper triangles, in thousandths."""
    blocks = []
    for place, cell in enumerate(study.cells):
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
