"""What a report says, as numbers: every run described, and runs compared in pairs, with controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from tqdm import tqdm

from jaxgrad.analysis import (
    DEFAULT_STATISTICS,
    Contrast,
    Description,
    Leakage,
    LengthMatch,
    LengthRegression,
    Resampling,
    Statistic,
    contrast,
    describe,
    find_statistic,
    leakage_contrast,
    length_regression,
    matched_contrast,
)
from jaxgrad.errors import UserError
from jaxgrad.report.cells import CORRECT, IRRELEVANT, Cell, Role
from jaxgrad.results.losses import RESPONSE_MEAN

Kind = Literal["setting", "response", "model"]
NORM, SUM_LOSS = "nuclear_norm", "sum_loss_norm"
# Shown layer by layer wherever there is room for a few.
CURVE_STATISTICS = (NORM, "sigma_ratio", "effective_rank")


@dataclass(frozen=True)
class CellCurves:
    """A cell's mean curves.

    Attributes:
        cell: The cell.
        descriptions: Name of a statistic -> curve, MAD and segments with intervals.
        missing: Name of a statistic -> why it is not there.
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
        contrasts: Name of a statistic -> contrast.
        match, matched: The second control for length, on the nuclear norm: who was matched, and their
            contrast (None where no two responses have about the same length). None for kind "model":
            the responses are the same.
        regression: The third, on the logarithm of the nuclear norm. None for kind "model".
        leakage: With and without the pairs whose irrelevant response is the correct one. None but for
            kind "response".
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
    def summed(self) -> Contrast | None:
        """The first control for length: the summed loss. None where the run's loss is no mean."""
        is_mean = self.first.examples.loss_name == RESPONSE_MEAN
        return self.contrasts.get(SUM_LOSS) if is_mean else None

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
class Report:
    """All that a report says.

    Attributes:
        title: Its heading.
        about: What was asked, in a sentence or two; may be empty.
        curves: One entry a cell, in the order given.
        comparisons: Those that the roles ask for.
        statistics: By name: the default ones, then those that were asked for besides.
        unavailable: What was asked for and is not there -> why.
        resampling: How intervals and p were made.
    """

    title: str
    about: str
    curves: Sequence[CellCurves]
    comparisons: Sequence[Comparison]
    statistics: Mapping[str, Statistic]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    resampling: Resampling = field(default_factory=Resampling)

    @property
    def cells(self) -> list[Cell]:
        """The cells, in the order given."""
        return [curves.cell for curves in self.curves]

    @property
    def loss_name(self) -> str:
        """The loss of all its runs."""
        return self.cells[0].examples.loss_name

    @property
    def more_statistics(self) -> list[Statistic]:
        """Those that were asked for besides the default ones."""
        return [one for name, one in self.statistics.items() if name not in DEFAULT_STATISTICS]

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
    statistics: Sequence[str] = (),
    resampling: Resampling = Resampling(),
    progress: bool = False,
) -> Report:
    """Describes every cell and compares those that differ in one part of their role alone.

    Args:
        cells: Of distinct roles, one or more, of one loss.
        title: The report's heading.
        about: What was asked.
        model_pairs: (base, instruction-tuned) names of models.
        unavailable: What was asked for and is not among the cells -> why.
        statistics: Names, besides the default ones.
        resampling: See there.
        progress: Show a bar on stderr.

    Raises:
        UserError: As `wanted_statistics`.
    """
    chosen = wanted_statistics(cells, statistics)
    wanted = wanted_pairs(cells, model_pairs)
    with tqdm(
        total=len(cells) + len(wanted), desc="comparing", disable=not progress, dynamic_ncols=True
    ) as bar:
        curves = []
        for cell in cells:
            curves.append(_describe(cell, resampling, tuple(chosen)))
            bar.update()
        comparisons = []
        for kind, first, second in wanted:
            comparisons.append(compare(kind, first, second, resampling, tuple(chosen)))
            bar.update()
    return Report(title, about, curves, comparisons, chosen, dict(unavailable or {}), resampling)


def wanted_statistics(cells: Sequence[Cell], more: Sequence[str] = ()) -> dict[str, Statistic]:
    """The statistics of a report by name: the default ones, then `more`.

    Raises:
        UserError: No statistic and no column of a cell has that name, or the cells are not of one loss.
    """
    losses = {cell.examples.loss_name: cell.examples.label for cell in cells}
    if len(losses) != 1:
        told = " and ".join(f"{label} of {name}" for name, label in losses.items())
        raise UserError(
            f"The runs have gradients of different losses: {told}. Report on runs of one loss."
        )
    (loss,) = losses
    stored = dict.fromkeys(name for cell in cells for name in cell.examples.column_ELP)
    return {
        name: find_statistic(name, loss=loss, stored=stored)
        for name in (*DEFAULT_STATISTICS, *more)
    }


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
    kind: Kind,
    first: Cell,
    second: Cell,
    resampling: Resampling = Resampling(),
    statistics: Sequence[str] = DEFAULT_STATISTICS,
) -> Comparison:
    """Two cells by every statistic and control that their runs allow.

    Args:
        kind: See `Comparison`.
        first: The reference.
        second: The other.
        resampling: See there.
        statistics: Names.
    """
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

    contrasts = {name: by(name) for name in statistics}
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


def _describe(cell: Cell, resampling: Resampling, statistics: Sequence[str]) -> CellCurves:
    descriptions, missing = {}, {}
    for name in statistics:
        try:
            descriptions[name] = describe(cell.examples.values(name), resampling)
        except UserError as error:
            missing[name] = str(error)
    return CellCurves(cell, descriptions, missing)
