"""The examples on the page, and the choice of them where not all fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.analysis import ExampleSet
from jaxgrad.errors import UserError
from jaxgrad.report.comparisons import CURVE_STATISTICS, NORM, Report
from jaxgrad.report.page_data import Block, block, curve, rounded

# Characters of an instruction or a response; the rest is counted.
_LONGEST_TEXT = 6000
# With fewer, the examples of a cell would show nothing: the two extremes and one between.
_FEWEST = 3
_FIRST_GUESS = 8
_ATTEMPTS = 6


@dataclass(frozen=True)
class EmbeddedExamples:
    """The examples' blocks.

    Attributes:
        blocks: Texts of each data set, numbers of each cell.
        embedded, total: Examples in them, and in the report.
    """

    blocks: list[Block]
    embedded: int
    total: int


def example_blocks(report: Report, room: int) -> EmbeddedExamples:
    """As many examples of each cell as fit into `room` bytes; none where not even three of each do.

    Where not all fit, a cell's examples are ordered by their nuclear norm (mean over layers and
    projections) and taken at even distances, the smallest and the largest included.
    """
    sets = [cell.examples for cell in report.cells]
    total = sum(examples.num_examples for examples in sets)
    most = max((examples.num_examples for examples in sets), default=0)
    readers = [_Reader(examples, report.statistics) for examples in sets]
    found = EmbeddedExamples([], 0, total)
    # Searches between a number that fits and one that does not; the bytes grow about as the number does.
    fits, fails, count = 0, most + 1, min(most, _FIRST_GUESS)
    for _ in range(_ATTEMPTS):
        if fails - fits <= 1 or fails <= min(_FEWEST, most):
            break
        chosen = [evenly(examples, count) for examples in sets]
        blocks = _blocks(report, chosen, readers)
        size = sum(item.num_bytes for item in blocks)
        if size > room:
            fails = count
        else:
            fits = count
            if count >= min(_FEWEST, most):
                found = EmbeddedExamples(blocks, sum(map(len, chosen)), total)
        count = min(max(int(count * room / size), fits + 1), fails - 1)
    return found


def evenly(examples: ExampleSet, count: int) -> list[int]:
    """Places of `count` examples at even distances by nuclear norm, both extremes among them."""
    if examples.num_examples <= count:
        return list(range(examples.num_examples))
    order = np.argsort(examples.column_ELP[NORM].mean(axis=(1, 2)), kind="stable")
    steps = np.linspace(0, examples.num_examples - 1, count).round().astype(int)
    return sorted(order[steps].tolist())


class _Reader:
    """The numbers of a set's examples, each made when it is first asked for."""

    def __init__(self, examples: ExampleSet, statistics: Iterable[str]) -> None:
        self._examples = examples
        self._found = {name: _values(examples, name) for name in statistics}
        self._items: dict[int, dict[str, Any]] = {}

    def item(self, e: int) -> dict[str, Any]:
        """Example `e` without its texts."""
        if e not in self._items:
            self._items[e] = self._read(e)
        return self._items[e]

    def _read(self, e: int) -> dict[str, Any]:
        examples = self._examples
        statistics: dict[str, list] = {}
        item: dict[str, Any] = {
            "index": int(examples.index_E[e]),
            "loss": rounded(float(examples.loss[e])),
            "tokens": rounded(float(examples.response_tokens[e]), 9),
            "truncated": None if examples.truncated_E is None else bool(examples.truncated_E[e]),
            "statistics": statistics,
        }
        for name, value_ELP in self._found.items():
            if value_ELP is None or not np.isfinite(value_ELP[e]).all():
                continue
            if name in CURVE_STATISTICS:
                statistics[name] = [curve(value_ELP[e, :, p]) for p in range(value_ELP.shape[2])]
            else:
                statistics[name] = [rounded(float(value)) for value in value_ELP[e].mean(axis=0)]
        return item


def _values(examples: ExampleSet, name: str) -> np.ndarray | None:
    """A statistic of every example [E, L, P], NaN where it is undefined; None without it."""
    try:
        values = examples.values(name)
    except UserError:
        return None
    if values.examples.num_examples == examples.num_examples:
        return values.value_ELP
    full = np.full((examples.num_examples, *values.value_ELP.shape[1:]), np.nan)
    full[np.isin(examples.index_E, values.examples.index_E)] = values.value_ELP
    return full


def _blocks(report: Report, chosen: Sequence[list[int]], readers: Sequence[_Reader]) -> list[Block]:
    texts: dict[str, dict[str, int]] = {name: {} for name in report.data_sets()}
    blocks = []
    for place, (cell, places) in enumerate(zip(report.cells, chosen, strict=True)):
        known = texts[cell.role.data]
        examples = cell.examples
        content = []
        for e in places:
            item = readers[place].item(e) | {"id": _shortened(examples.example_ids[e], 200)}
            for name, text in (
                ("instruction", examples.instructions[e]),
                ("response", examples.responses[e]),
            ):
                if text is not None:
                    item[name] = known.setdefault(_shortened(text), len(known))
            content.append(item)
        blocks.append(block(f"examples-{place}", content))
    for number, name in enumerate(texts):
        blocks.append(block(f"texts-{number}", list(texts[name])))
    return blocks


def _shortened(text: str, longest: int = _LONGEST_TEXT) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest} more characters in the run's tables)"
