"""Every run described, and every two runs that a study is about compared, with controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from tqdm import tqdm

from jaxgrad.analysis import (
    STATISTICS,
    Contrast,
    Description,
    Leakage,
    LengthMatch,
    LengthRegression,
    Resampling,
    contrast,
    describe,
    leakage_contrast,
    length_regression,
    matched_contrast,
)
from jaxgrad.errors import UserError
from jaxgrad.report.cells import CORRECT, IRRELEVANT, Cell, Role

Kind = Literal["setting", "response", "model"]
NORM, SUM_LOSS = "nuclear_norm", "sum_loss_norm"


@dataclass(frozen=True)
class CellCurves:
    """A cell's mean curves.

    Attributes:
        cell: The cell.
        descriptions: Statistic -> curve, MAD and segments with intervals.
        missing: Statistic -> why it is not there.
    """

    cell: Cell
    descriptions: Mapping[str, Description]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two cells compared; the first is the reference.

    Attributes:
        kind: What differs: the setting (none against detailed), the response (correct against
            irrelevant) or the model (base against instruction-tuned).
        first, second: The cells.
        contrasts: Statistic -> contrast; "sum_loss_norm" is the first control for length.
        match, matched: The second control, on the nuclear norm: who was matched, and their contrast
            (None where no two responses have about the same length). Not of kind "model", whose
            responses are the same.
        regression: The third, on the logarithm of the nuclear norm; not of kind "model" either.
        leakage: With and without the pairs whose irrelevant response is the correct one; of kind
            "response" alone.
        missing: Name of a statistic or control -> why it is not there.
    """

    kind: Kind
    first: Cell
    second: Cell
    contrasts: Mapping[str, Contrast]
    match: LengthMatch | None
    matched: Contrast | None
    regression: LengthRegression | None
    leakage: Leakage | None
    missing: Mapping[str, str]

    @property
    def title(self) -> str:
        """What is compared: "AQuA: none to detailed"."""
        one, two = self.first.role, self.second.role
        if self.kind == "setting":
            other = "" if one.response == CORRECT else f" ({one.response})"
            return f"{one.data or one.model}: {one.setting} to {two.setting}{other}"
        if self.kind == "response":
            return f"{one.title}: {one.response} to {two.response}"
        return f"{one.title}: {one.model} to {two.model}"


@dataclass(frozen=True)
class Study:
    """All that a report says.

    Attributes:
        title: Its heading.
        about: What was asked, in a sentence or two; may be empty.
        curves: One entry a cell, in the order of the study.
        comparisons: Those that the roles ask for.
        unavailable: What was asked for and is not there -> why.
        resampling: How intervals and p were made.
    """

    title: str
    about: str
    curves: Sequence[CellCurves]
    comparisons: Sequence[Comparison]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    resampling: Resampling = field(default_factory=Resampling)

    @property
    def cells(self) -> list[Cell]:
        """The cells, in the order of the study."""
        return [curves.cell for curves in self.curves]

    def models(self) -> list[str]:
        """Names of the models, in order."""
        return list(dict.fromkeys(cell.role.model for cell in self.cells))

    def data_sets(self) -> list[str]:
        """Names of the data sets, in order."""
        return list(dict.fromkeys(cell.role.data for cell in self.cells))

    def find(self, role: Role) -> CellCurves | None:
        """The curves of a role."""
        return next((curves for curves in self.curves if curves.cell.role == role), None)


def compare_all(
    cells: Sequence[Cell],
    *,
    title: str,
    about: str = "",
    model_pairs: Sequence[tuple[str, str]] = (),
    unavailable: Mapping[str, str] | None = None,
    resampling: Resampling = Resampling(),
    progress: bool = False,
) -> Study:
    """Describes every cell and compares those that differ in one part of their role alone.

    Args:
        cells: Of distinct roles.
        title: The study's heading.
        about: What was asked.
        model_pairs: (base, instruction-tuned) names of models.
        unavailable: What was asked for and is not among the cells -> why.
        resampling: See there.
        progress: Show a bar on stderr.
    """
    wanted = wanted_pairs(cells, model_pairs)
    with tqdm(
        total=len(cells) + len(wanted), desc="comparing", disable=not progress, dynamic_ncols=True
    ) as bar:
        curves = []
        for cell in cells:
            curves.append(_describe(cell, resampling))
            bar.update()
        comparisons = []
        for kind, first, second in wanted:
            comparisons.append(compare(kind, first, second, resampling))
            bar.update()
    return Study(title, about, curves, comparisons, dict(unavailable or {}), resampling)


def wanted_pairs(
    cells: Sequence[Cell], model_pairs: Sequence[tuple[str, str]]
) -> list[tuple[Kind, Cell, Cell]]:
    """Which cells are compared: two settings, two responses or two models, all else equal."""
    pairs: list[tuple[Kind, Cell, Cell]] = []
    for first, second in combinations(cells, 2):
        one, two = first.role, second.role
        if (one.model, one.data, one.response) == (two.model, two.data, two.response):
            pairs.append(("setting", first, second))
        elif (one.model, one.data, one.setting) == (two.model, two.data, two.setting):
            correct_first = (one.response, two.response) == (CORRECT, IRRELEVANT)
            pairs.append(
                ("response", first, second) if correct_first else ("response", second, first)
            )
        elif (one.data, one.setting, one.response) == (two.data, two.setting, two.response):
            if (one.model, two.model) in model_pairs:
                pairs.append(("model", first, second))
            elif (two.model, one.model) in model_pairs:
                pairs.append(("model", second, first))
    return pairs


def compare(
    kind: Kind, first: Cell, second: Cell, resampling: Resampling = Resampling()
) -> Comparison:
    """Two cells by every statistic and control that their runs allow."""
    one, two = first.examples, second.examples
    missing: dict[str, str] = {}

    def attempt(name: str, of: Callable[[], Any]) -> Any:
        try:
            return of()
        except UserError as error:
            missing[name] = str(error)
            return None

    same_model = kind != "model"

    def by(statistic: str) -> Contrast | None:
        return attempt(
            statistic,
            lambda: contrast(one, two, statistic, same_model=same_model, resampling=resampling),
        )

    contrasts = {name: by(name) for name in STATISTICS}
    match = matched = regression = leakage = None
    if kind != "model":
        pair = attempt("matched", lambda: matched_contrast(one, two, resampling=resampling))
        match, matched = pair or (None, None)
        regression = attempt(
            "regression", lambda: length_regression(one, two, resampling=resampling)
        )
    if kind == "response":
        leakage = attempt("leakage", lambda: leakage_contrast(one, two, resampling=resampling))
    found = {name: value for name, value in contrasts.items() if value is not None}
    return Comparison(kind, first, second, found, match, matched, regression, leakage, missing)


def _describe(cell: Cell, resampling: Resampling) -> CellCurves:
    descriptions, missing = {}, {}
    for name in STATISTICS:
        try:
            descriptions[name] = describe(cell.examples.values(name), resampling)
        except UserError as error:
            missing[name] = str(error)
    return CellCurves(cell, descriptions, missing)
