"""What can be analysed of a run: each statistic is declared here, once, and nowhere else.

A statistic has one value for each example and matrix. Every column of the matrices table that holds a
number is one, by its declaration in `results.columns`: nothing is to be added here for a new column. A
column that a file has and this version does not know is one too, by its name. `DERIVED` has those that are
computed from columns. Messages, tables, figures and the page take what they say of a statistic from here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from jaxgrad.errors import UserError
from jaxgrad.results.columns import ADDRESS, MATRICES, PAPER, PER_WEIGHT, Column
from jaxgrad.results.losses import RESPONSE_MEAN, RESPONSE_SUM

# Takes an array for each needed column: [E, L, P] of the matrices table, [E, 1, 1] of the examples table.
# A division by zero may be left as it is: a value that is not finite counts as undefined.
Formula = Callable[..., np.ndarray]


def _as_stored(column_ELP: np.ndarray) -> np.ndarray:
    return column_ELP


@dataclass(frozen=True)
class Statistic:
    """A number of each example and matrix.

    Attributes:
        name: In arguments, files and flags.
        columns: The columns of the two tables that it is made of.
        formula: Makes it of their arrays, in that order; the result is broadcast to [E, L, P].
        unit: Of its values; "" where there is none.
        definition: One line for people.
        source: Who defined it; "" where that is this project.
        undefined_when: When a matrix has no value, which leaves its example out; "" for never.
        title: For headings.
        axis: For the axis of a figure.
        short: For the head of a narrow column.
        losses: The losses for whose gradients the formula is right; empty for every loss.
    """

    name: str
    columns: tuple[str, ...]
    formula: Formula
    unit: str
    definition: str
    source: str
    undefined_when: str
    title: str
    axis: str
    short: str
    losses: tuple[str, ...] = ()

    def is_for(self, loss: str) -> bool:
        """Whether it means what it says for gradients of this loss."""
        return not self.losses or loss in self.losses

    @property
    def sentence(self) -> str:
        """The definition as a sentence."""
        first = self.definition.split(" ")[0]
        text = first.capitalize() + self.definition[len(first) :] if first.isalpha() else None
        return f"{text or self.definition}."

    @property
    def about(self) -> str:
        """All that is declared of it, in a sentence or two."""
        source = f" ({self.source})" if self.source else ""
        unit = f"; in {self.unit}" if self.unit else ""
        text = f"{self.title}: {self.definition}{source}{unit}."
        return text + (f" Undefined when {self.undefined_when}." if self.undefined_when else "")


def _stored(column: Column) -> Statistic:
    return Statistic(
        name=column.name,
        columns=(column.name,),
        formula=_as_stored,
        unit=column.unit,
        definition=column.definition,
        source=column.source,
        undefined_when=column.null_when,
        title=column.heading,
        axis=column.axis_label,
        short=column.short_label,
    )


# Every number of a matrix that is stored.
STORED = tuple(_stored(c) for c in MATRICES if c.is_number and c not in ADDRESS)

_SIGMA_RATIO = Statistic(
    name="sigma_ratio",
    columns=("sigma_max", "nuclear_norm"),
    formula=lambda sigma_max, norm: sigma_max / norm,
    unit="",
    definition="largest singular value over the nuclear norm: 1 where the gradient has rank one",
    source=PAPER,
    undefined_when="the gradient is zero",
    title="Share of the largest singular value",
    axis="σ₁ / nuclear norm",
    short="σ₁ share",
)
_EFFECTIVE_RANK_FRACTION = Statistic(
    name="effective_rank_fraction",
    columns=("effective_rank", "rank_bound"),
    formula=lambda rank, bound: rank / bound,
    unit="",
    definition="effective rank over the largest rank that the matrix and the number of tokens allow",
    source="",
    undefined_when="the effective rank is undefined",
    title="Effective rank, share of its ceiling",
    axis="effective rank / ceiling",
    short="… of ceiling",
)
_LOSS_NORMALISED_NORM = Statistic(
    name="loss_normalised_norm",
    columns=("nuclear_norm", "loss"),
    formula=lambda norm, loss: norm / loss,
    unit="per unit of weight",
    definition="nuclear norm over the example's loss",
    source="",
    undefined_when="the loss is zero",
    title="Nuclear norm per loss",
    axis="nuclear norm / loss",
    short="norm / loss",
)
# The gradient of the summed loss is the mean loss's times the number of response tokens, and so are its
# singular values: no new run is needed for it.
_SUM_LOSS_NORM = Statistic(
    name="sum_loss_norm",
    columns=("nuclear_norm", "num_response_tokens"),
    formula=lambda norm, tokens: norm * tokens,
    unit=PER_WEIGHT,
    definition="nuclear norm times the number of response tokens: that of the gradient of the summed loss",
    source="",
    undefined_when="",
    title="Nuclear norm of the summed loss",
    axis="nuclear norm, summed loss",
    short="norm, summed",
    losses=(RESPONSE_MEAN,),
)
_SUM_LOSS_NORM_OF_SUM = dataclasses.replace(
    _SUM_LOSS_NORM,
    columns=("nuclear_norm",),
    formula=_as_stored,
    definition="nuclear norm as it was measured: the run's loss is the sum",
    losses=(RESPONSE_SUM,),
)

# Of a name that stands here more than once each is for other losses.
DERIVED = (
    _SIGMA_RATIO,
    _EFFECTIVE_RANK_FRACTION,
    _LOSS_NORMALISED_NORM,
    _SUM_LOSS_NORM,
    _SUM_LOSS_NORM_OF_SUM,
)

# What a report is of, in its order, where nothing else is asked for.
DEFAULT_STATISTICS = (
    "nuclear_norm",
    "sigma_ratio",
    "effective_rank",
    "effective_rank_fraction",
    "loss_normalised_norm",
    "sum_loss_norm",
)


def _by_name() -> dict[str, tuple[Statistic, ...]]:
    found: dict[str, tuple[Statistic, ...]] = {name: () for name in DEFAULT_STATISTICS}
    for one in (*STORED, *DERIVED):
        found[one.name] = (*found.get(one.name, ()), one)
    return found


# Name -> the statistics of that name, each for other losses. The default ones come first.
STATISTICS: Mapping[str, tuple[Statistic, ...]] = MappingProxyType(_by_name())


def find_statistic(
    name: str, *, loss: str = RESPONSE_MEAN, stored: Iterable[str] = ()
) -> Statistic:
    """The statistic of a name.

    Args:
        name: Of `STATISTICS`, or of a column that is stored.
        loss: Whose gradients it is of. Where the name is for other losses alone, the result is one of
            theirs: ask `is_for`.
        stored: The number columns that the files at hand have; those of the declared ones may be left out.

    Raises:
        UserError: There is none of this name.
    """
    if name in STATISTICS:
        variants = STATISTICS[name]
        return next((one for one in variants if one.is_for(loss)), variants[0])
    unknown = dict.fromkeys(column for column in stored if column not in STATISTICS)
    if name not in unknown:
        raise UserError(f"No statistic {name!r}: there are {', '.join([*STATISTICS, *unknown])}.")
    definition = "a column of the files that this version does not know"
    return _stored(Column(name, pa.float64(), "", definition))
