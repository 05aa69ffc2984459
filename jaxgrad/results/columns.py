"""The columns of the two tables that a run writes: each is declared here, once, and nowhere else.

The Parquet schema, the reading back, the analysis, the tables, the figures' labels, the page and
`docs/results.md` take names and definitions from these declarations. A reducer of `measure.reducers`
fills the columns that are declared for it.

A matrix is the gradient of one example's loss by one weight, of shape [rows, cols] as PyTorch stores it,
with singular values sigma. A quantity that was not asked for, or is undefined, is null. A NaN in a column
for which NaN is not "undefined" is a measured NaN.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

PAPER, FOLLOW_UP = "arXiv 2410.23743", "arXiv 2504.10766"
PER_WEIGHT = "nats per unit of weight"  # with --loss=response_mean: nats a token per unit of weight


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: in the file; a public name.
        type: in the file.
        unit: of its numbers; "" where there is none.
        definition: one line for people.
        source: who defined it; "" where that is this project.
        null_when: when a row has no value; "" for never.
        nan_is_null: whether a NaN means that there is no value.
        length_column: of a list, the column that says how many of its numbers are kept; None for all.
        title: for headings; the name in words where it is not given.
        axis: for the axis of a figure; the title in lower case where it is not given.
        short: for the head of a narrow column; the axis' where it is not given.
    """

    name: str
    type: pa.DataType
    unit: str
    definition: str
    source: str = ""
    null_when: str = ""
    nan_is_null: bool = False
    length_column: str | None = None
    title: str = ""
    axis: str = ""
    short: str = ""

    @property
    def heading(self) -> str:
        """What people call it."""
        return self.title or self.name.replace("_", " ").capitalize()

    @property
    def axis_label(self) -> str:
        """What an axis of it is called."""
        return self.axis or self.heading.lower()

    @property
    def short_label(self) -> str:
        """What a narrow column of it is called."""
        return self.short or self.axis_label

    @property
    def is_list(self) -> bool:
        """Whether a row has a list of numbers."""
        return pa.types.is_list(self.type)

    @property
    def is_number(self) -> bool:
        """Whether a row has one number."""
        return pa.types.is_floating(self.type) or pa.types.is_integer(self.type)


# Parquet calls a list's inner field "element": the same name here survives the round trip.
_NUMBERS = pa.list_(pa.field("element", pa.float64()))


def _number(name: str, unit: str, definition: str, **rest: Any) -> Column:
    return Column(name, pa.float64(), unit, definition, **rest)


EXAMPLES = (
    Column(
        "example_index",
        pa.int64(),
        "",
        "position in the data file, from 0; joins the two tables",
    ),
    Column("example_id", pa.string(), "", "the record's own id, or its position as text"),
    Column(
        "num_tokens", pa.int32(), "tokens", "of the sequence that was measured, without padding"
    ),
    Column("num_prompt_tokens", pa.int32(), "tokens", "of it that carry no loss"),
    Column("num_response_tokens", pa.int32(), "tokens", "of it that carry the loss"),
    Column("truncated", pa.bool_(), "", "the sequence was cut at max_length"),
    _number(
        "loss",
        "nats a token (--loss=response_mean), nats (response_sum)",
        "the value of the run's loss",
        source=PAPER,
        null_when="it was not computed",
    ),
    Column(
        "status",
        pa.string(),
        "",
        "ok, skipped (never computed) or non_finite (computed, not to be used)",
    ),
    Column("reason", pa.string(), "", "why the status is not ok", null_when="it is ok"),
    Column("instruction", pa.string(), "", "the prompt's text, with the record's input appended"),
    Column(
        "response",
        pa.string(),
        "",
        "the response's text; behind it, as JSON, what else the last turn has",
    ),
)

ADDRESS = (
    Column("example_index", pa.int64(), "", "as in the examples table"),
    Column(
        "layer",
        pa.int32(),
        "",
        "decoder layer, from 0",
        null_when="the projection is lm_head",
        nan_is_null=True,
    ),
    Column("projection", pa.string(), "", "q, k, v, o, gate, up, down or lm_head"),
    Column(
        "expert",
        pa.int32(),
        "",
        "expert of a mixture, from 0",
        null_when="the layer has no experts",
        nan_is_null=True,
    ),
    Column(
        "part",
        pa.string(),
        "",
        "part of a weight that is measured in parts",
        null_when="the weight is measured whole",
    ),
    Column("rows", pa.int32(), "", "outputs of the weight", nan_is_null=True),
    Column("cols", pa.int32(), "", "inputs of the weight", nan_is_null=True),
)

# Filled by the reducer `spectra`.
SPECTRA = (
    _number(
        "nuclear_norm",
        PER_WEIGHT,
        "sum of sigma, the singular values of one example's gradient of the run's loss",
        source=PAPER,
        short="norm",
    ),
    _number(
        "sigma_max",
        PER_WEIGHT,
        "largest sigma",
        source=PAPER,
        title="Largest singular value",
        axis="σ₁",
    ),
    _number(
        "sigma_min",
        PER_WEIGHT,
        "smallest of the min(rows, cols) sigma; 0 beyond the rank bound",
        source=PAPER,
        title="Smallest singular value",
        axis="smallest σ",
    ),
    _number(
        "frobenius_norm", PER_WEIGHT, "square root of the sum of squared entries", source=PAPER
    ),
    _number("entry_mean", PER_WEIGHT, "mean of the entries", source=PAPER, title="Mean entry"),
    _number(
        "effective_rank",
        "",
        "exp(-sum p ln p), p = sigma / nuclear_norm: how many directions the gradient has",
        source=FOLLOW_UP,
        short="eff. rank",
        null_when="the nuclear norm is below 1e-12",
        nan_is_null=True,
    ),
    _number(
        "stable_rank",
        "",
        "(frobenius_norm / sigma_max)^2",
        null_when="the gradient is zero",
        nan_is_null=True,
    ),
    _number(
        "condition_number",
        "",
        "sigma_max / sigma at the numerical rank",
        null_when="the gradient is zero",
        nan_is_null=True,
    ),
    Column(
        "rank_bound",
        pa.int32(),
        "",
        "min(tokens with a gradient, rows, cols): the ceiling of the rank",
        nan_is_null=True,
    ),
    Column(
        "singular_values",
        _NUMBERS,
        PER_WEIGHT,
        "sigma, largest first, up to rank_bound of them",
        source=FOLLOW_UP,
        null_when="the run was made without --spectrum",
        length_column="rank_bound",
    ),
)

# Filled by the reducer `extremes`.
EXTREMES = tuple(
    _number(
        name,
        PER_WEIGHT,
        definition,
        source=PAPER,
        null_when="the run was made without --extremes",
        nan_is_null=True,
        title=title,
    )
    for name, definition, title in (
        ("entry_max", "largest entry", "Largest entry"),
        ("entry_min", "smallest entry", "Smallest entry"),
    )
)

# Filled by the reducer `similarities`. Cosines are between gradients that are flattened row by row.
SIMILARITIES = (
    _number(
        "partner_cosine",
        "",
        "cosine of q and o, of k and v in the layer",
        source=FOLLOW_UP,
        null_when="the run was made without --similarity, or one of the two gradients is zero",
        nan_is_null=True,
        title="Cosine with the partner",
    ),
    Column(
        "layer_cosines",
        _NUMBERS,
        "",
        "cosines with the same projection in each measured layer; NaN where one gradient is zero",
        source=FOLLOW_UP,
        null_when="the run was made without --similarity",
    ),
)


def _in_file_order() -> tuple[Column, ...]:
    """The matrices table: the extremes stand behind the mean of the entries."""
    place = 1 + [column.name for column in SPECTRA].index("entry_mean")
    return (*ADDRESS, *SPECTRA[:place], *EXTREMES, *SPECTRA[place:], *SIMILARITIES)


MATRICES = _in_file_order()


def schema_of(columns: Iterable[Column]) -> pa.Schema:
    """The columns as Arrow has them."""
    return pa.schema([(column.name, column.type) for column in columns])


def conform(table: pa.Table, columns: Iterable[Column]) -> pa.Table:
    """A table as it was written, by this version or another, with all columns of this one.

    A column that it lacks is null. One that is not declared here is kept, behind the others.

    Raises:
        pa.ArrowException: a column has values that its declared type does not hold.
    """
    declared = {column.name: column.type for column in columns}
    found = {
        name: table.column(name).cast(kind)
        if name in table.column_names
        else pa.nulls(table.num_rows, kind)
        for name, kind in declared.items()
    }
    unknown = [name for name in table.column_names if name not in declared]
    return pa.table(found | {name: table.column(name) for name in unknown})
