"""One run as dense arrays: a value for every example, layer and projection, and what was left out."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxgrad.analysis.addresses import within_layer
from jaxgrad.analysis.curves import has_every_layer
from jaxgrad.analysis.statistics import find_statistic
from jaxgrad.errors import UserError
from jaxgrad.projections import ATTENTION
from jaxgrad.results.columns import ADDRESS, EXAMPLES, MATRICES, Column
from jaxgrad.results.losses import loss_of
from jaxgrad.results.read import Results

# These say which matrix a number belongs to.
_ADDRESS = {column.name for column in ADDRESS}
_NORM = "nuclear_norm"


@dataclass(frozen=True)
class LeftOut:
    """An example that a statistic is computed without, and why."""

    example_index: int
    example_id: str
    reason: str


@dataclass(frozen=True)
class ExampleSet:
    """The usable examples of one run; made by `example_set`.

    Attributes:
        label: What messages and tables call it.
        run: The content of run.json.
        layers: Measured layers, ascending.
        projections: The axis P: the matrices' addresses within a layer, as words. "q" is a whole weight,
            "up.3" that of an expert, "q.lora_A" a part. In the order of a layer.
        index_E: Position of each example in its data file, ascending.
        occurrence_E: How many earlier examples of the data file have the same instruction. Those left
            out count too: a skipped duplicate must not shift the pairing of the next one.
        example_ids, instructions, responses: Texts, one an example.
        truncated_E: Cut at max_length. Such examples are used. None where the file does not tell.
        column_E: The numbers of the examples table by column, NaN where null.
        column_ELP: The numbers of the matrices table by column, NaN where null. A column without a single
            number is not there.
        left_out: The examples that are not in the arrays.
    """

    label: str
    run: Mapping[str, Any]
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    index_E: np.ndarray
    occurrence_E: np.ndarray
    example_ids: tuple[str, ...]
    instructions: tuple[str | None, ...]
    responses: tuple[str | None, ...]
    truncated_E: np.ndarray | None
    column_E: Mapping[str, np.ndarray]
    column_ELP: Mapping[str, np.ndarray]
    left_out: tuple[LeftOut, ...]

    @property
    def num_examples(self) -> int:
        """How many examples are in the arrays."""
        return len(self.index_E)

    @property
    def loss_name(self) -> str:
        """Whose gradients these are, as --loss names it."""
        return loss_of(self.run)

    @property
    def loss(self) -> np.ndarray:
        """The value of that loss, in its unit; NaN where unknown."""
        return self.column_E["loss"]

    @property
    def response_tokens(self) -> np.ndarray:
        """Tokens that carry the loss; NaN where unknown."""
        return self.column_E["num_response_tokens"]

    @property
    def num_truncated(self) -> int | None:
        """How many of them were cut at max_length; None where the file does not tell."""
        return None if self.truncated_E is None else int(self.truncated_E.sum())

    @property
    def has_every_layer(self) -> bool:
        """Whether MAD and segments are defined: all layers of the model, without a gap."""
        config = self.run.get("identity", {}).get("model", {}).get("config", {})
        return has_every_layer(self.layers, config.get("num_layers"))

    def reasons(self) -> dict[str, int]:
        """Reason -> how many examples were left out for it."""
        return dict(sorted(Counter(item.reason for item in self.left_out).items()))

    def subset(self, keep: np.ndarray, reason: str) -> "ExampleSet":
        """Some of the examples; the others are added to `left_out`.

        Args:
            keep: Boolean mask [E].
            reason: Why the others are left out.
        """
        keep_E = np.asarray(keep, bool)
        out = [
            LeftOut(int(self.index_E[e]), self.example_ids[e], reason)
            for e in np.flatnonzero(~keep_E)
        ]

        def texts(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[e] for e in np.flatnonzero(keep_E).tolist())

        return dataclasses.replace(
            self,
            index_E=self.index_E[keep_E],
            occurrence_E=self.occurrence_E[keep_E],
            example_ids=texts(self.example_ids),
            instructions=texts(self.instructions),
            responses=texts(self.responses),
            truncated_E=None if self.truncated_E is None else self.truncated_E[keep_E],
            column_E={name: column[keep_E] for name, column in self.column_E.items()},
            column_ELP={name: column[keep_E] for name, column in self.column_ELP.items()},
            left_out=(*self.left_out, *out),
        )

    def values(self, statistic: str = _NORM) -> "Values":
        """A statistic of every example for which it is defined in every layer and projection.

        Args:
            statistic: A name of `STATISTICS`, or of a column of the file that is not declared there.

        Raises:
            UserError: No such statistic; it is not for gradients of the run's loss; no example has a
                column that it needs; or it is defined for no example.
        """
        found = find_statistic(statistic, loss=self.loss_name, stored=self.column_ELP)
        if not found.is_for(self.loss_name):
            raise UserError(
                f"{self.label}: {statistic} is not known for gradients of the loss {self.loss_name}. "
                "Choose another statistic."
            )
        shape = (self.num_examples, len(self.layers), len(self.projections))
        with np.errstate(all="ignore"):
            value = found.formula(*(self._column(name, statistic) for name in found.columns))
        value_ELP: np.ndarray = np.broadcast_to(np.asarray(value, np.float64), shape)
        defined_E = np.isfinite(value_ELP).all(axis=(1, 2))
        if not defined_E.any():
            when = f" (undefined when {found.undefined_when})" if found.undefined_when else ""
            raise UserError(f"{self.label}: {statistic} is defined for none of its examples{when}.")
        examples = self
        if not defined_E.all():
            examples = self.subset(defined_E, f"{statistic} undefined in a matrix")
        return Values(examples, statistic, value_ELP[defined_E])

    def _column(self, name: str, statistic: str) -> np.ndarray:
        """A column of either table as a formula takes it: [E, L, P] or [E, 1, 1]."""
        column = self.column_ELP.get(name)
        if column is None and name in self.column_E:
            column = self.column_E[name][:, None, None]
        if column is None or np.isnan(column).all():
            raise UserError(
                f"{self.label}: {name} was not measured, and {statistic} needs it. "
                "Analyze the data again, or choose another statistic."
            )
        return column


@dataclass(frozen=True)
class Values:
    """A statistic of a set, all finite.

    Attributes:
        examples: Those for which it is defined; the others are in its `left_out`.
        statistic: Its name.
        value_ELP: float64 [E, L, P].
    """

    examples: ExampleSet
    statistic: str
    value_ELP: np.ndarray

    @property
    def per_example(self) -> np.ndarray:
        """Mean over layers: the one number an example has for each projection [E, P]."""
        return self.value_ELP.mean(axis=1)


def example_set(
    results: Results, label: str, *, projections: Sequence[str] | None = None
) -> ExampleSet:
    """A run's tables as arrays.

    An example is left out, with the reason, when its status is not ok, when it lacks a matrix that
    others have, or when a nuclear norm or the loss is not finite.

    Args:
        results: From `read_results` or `read_authors_jsonl`.
        label: What messages and tables call the set.
        projections: Which matrices of a layer, by their words ("q", "up.3"). By default the first of
            these that the run has: whole weights of q, k, v, o; other whole weights; experts and parts.

    Raises:
        UserError: A run that is not finished, tables that do not fit together (a matrix twice, or
            of no example), a projection or a layer's matrix that was measured for no example, or
            not a single usable example.
    """
    if not results.run.get("finished", True):
        raise UserError(
            f"{label}: the run is not finished, its statistics would be of a part of the data. "
            "Run the same analyze command again: it continues."
        )
    examples = results.examples.sort_values("example_index", kind="stable")
    if examples["example_index"].duplicated().any():
        raise UserError(f"{label}: the examples table has an example twice. Analyze it again.")
    if not (examples["status"] == "ok").any():
        raise UserError(f"{label}: not one of {len(examples)} examples was measured.")
    matrices = results.matrices[results.matrices["layer"].notna()]
    unknown = set(matrices["example_index"]) - set(examples["example_index"])
    if unknown:
        raise UserError(
            f"{label}: the matrices table has example {min(unknown)}, the examples table has not. "
            "Copy the run again, or analyze the data again."
        )
    axis = within_layer(matrices)
    chosen = _choose(label, axis.words, [one.within_layer for one in axis.whole], projections)
    place_P = pd.Index(chosen).get_indexer(axis.word_of_each())
    matrices, place_P = matrices[place_P >= 0], place_P[place_P >= 0]
    ok = examples[examples["status"] == "ok"]
    dense, layers = _dense(label, matrices, place_P, ok["example_index"].to_numpy(), chosen)
    reasons = _reasons(ok, dense, layers, chosen)
    keep_E = np.array([reason is None for reason in reasons])
    if not keep_E.any():
        raise UserError(f"{label}: not one of {len(ok)} examples can be used: {reasons[0]}.")
    why = dict(zip(ok["example_index"], reasons, strict=True))
    left_out = tuple(
        LeftOut(int(row.example_index), str(row.example_id), _reason(row, why))
        for row in examples.itertuples()
        if row.status != "ok" or why[row.example_index] is not None
    )
    occurrence = examples.groupby("instruction", dropna=False, sort=False).cumcount()
    used = ok[keep_E]
    truncated = None if used["truncated"].isna().any() else used["truncated"].to_numpy(bool)
    return ExampleSet(
        label=label,
        run=results.run,
        layers=layers,
        projections=chosen,
        index_E=used["example_index"].to_numpy(np.int64),
        occurrence_E=occurrence.loc[used.index].to_numpy(np.int64),
        example_ids=tuple(used["example_id"]),
        instructions=_texts(used["instruction"]),
        responses=_texts(used["response"]),
        truncated_E=truncated,
        column_E={name: _numbers(used[name]) for name in _number_columns(used, EXAMPLES)},
        column_ELP={name: column[keep_E] for name, column in dense.items()},
        left_out=left_out,
    )


def _texts(column: pd.Series) -> tuple[str | None, ...]:
    # Pandas has None or NaN for a null string, depending on its version and on the other values.
    return tuple(None if pd.isna(text) else text for text in column)


def _reason(row: Any, why: Mapping[int, str | None]) -> str:
    if row.status == "ok":
        return str(why[row.example_index])
    return row.status if pd.isna(row.reason) else f"{row.status}: {row.reason}"


def _choose(
    label: str, measured: Sequence[str], whole: Sequence[str], asked: Sequence[str] | None
) -> tuple[str, ...]:
    if not measured:
        raise UserError(f"{label}: no matrix of a layer was measured.")
    if asked is None:
        # Never experts or parts beside whole weights: they are gradients of other things.
        return tuple(word for word in whole if word in ATTENTION) or tuple(whole or measured)
    missing = [word for word in asked if word not in measured]
    if missing or not asked:
        raise UserError(
            f"{label}: {', '.join(missing) or 'no projection'} asked for, "
            f"{', '.join(measured)} measured."
        )
    return tuple(word for word in measured if word in asked)


def _number_columns(table: pd.DataFrame, declared: Sequence[Column]) -> list[str]:
    """The columns of a table that hold numbers, those that are not declared included."""
    known = {column.name: column.is_number for column in declared}
    return [
        name
        for name in table.columns
        if name not in _ADDRESS
        and known.get(name, pd.api.types.is_any_real_numeric_dtype(table[name]))
    ]


def _numbers(column: pd.Series) -> np.ndarray:
    return column.to_numpy(np.float64, na_value=np.nan)


def _dense(
    label: str,
    matrices: pd.DataFrame,
    place_P: np.ndarray,
    index_E: np.ndarray,
    projections: tuple[str, ...],
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """The columns as [E, L, P], and `present` (1.0 where the table has a row).

    Args:
        label: For messages.
        matrices: Rows of the chosen projections.
        place_P: Each row's place among them.
        index_E: The examples that are wanted.
        projections: The chosen ones.
    """
    wanted = matrices["example_index"].isin(index_E).to_numpy()
    matrices, place_P = matrices[wanted], place_P[wanted]
    layer = matrices["layer"].to_numpy(np.int64)
    layers = np.unique(layer)
    shape = (len(index_E), len(layers), len(projections))
    place = np.ravel_multi_index(
        (
            pd.Index(index_E).get_indexer(matrices["example_index"]),
            np.searchsorted(layers, layer),
            place_P,
        ),
        shape,
    )
    present = np.bincount(place, minlength=int(np.prod(shape))).reshape(shape)
    if (present > 1).any():
        e, at, p = np.argwhere(present > 1)[0]
        raise UserError(
            f"{label}: example {index_E[e]} has layer {layers[at]} {projections[p]} twice. "
            "Analyze the data again."
        )
    never = np.argwhere(~(present > 0).any(axis=0))
    if len(never):
        at, p = never[0]
        raise UserError(
            f"{label}: layer {layers[at]} {projections[p]} was measured for no example, other "
            "layers' was. Choose projections that every layer has, or analyze with other parameters."
        )
    dense = {"present": present.astype(np.float64)}
    for name in _number_columns(matrices, MATRICES):
        numbers = _numbers(matrices[name])
        if name == _NORM or not np.isnan(numbers).all():
            dense[name] = np.full(shape, np.nan)
            dense[name].reshape(-1)[place] = numbers
    return dense, tuple(int(value) for value in layers)


def _reasons(
    ok: pd.DataFrame,
    dense: dict[str, np.ndarray],
    layers: tuple[int, ...],
    projections: tuple[str, ...],
) -> list[str | None]:
    """Why each ok example cannot be used, or None; takes `present` out of `dense`."""
    missing_E = (dense.pop("present") == 0).sum(axis=(1, 2))
    bad_E = (~np.isfinite(dense[_NORM])).sum(axis=(1, 2)) - missing_E
    total = len(layers) * len(projections)
    reasons: list[str | None] = []
    for missing, bad, loss in zip(missing_E, bad_E, ok["loss"], strict=True):
        if missing:
            reasons.append(f"{missing} of {total} matrices missing")
        elif bad:
            reasons.append(f"nuclear norm not finite in {bad} of {total} matrices")
        elif not np.isfinite(loss):
            reasons.append("loss not finite")
        else:
            reasons.append(None)
    return reasons
