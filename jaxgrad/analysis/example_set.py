"""One run as dense arrays: a value for every example, layer and projection, and who was left out."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxgrad.analysis.curves import has_every_layer
from jaxgrad.errors import UserError
from jaxgrad.projections import ATTENTION, PROJECTION_NAMES
from jaxgrad.results.read import Results

# Statistic -> the columns it is made of.
STATISTICS = {
    "nuclear_norm": ("nuclear_norm",),
    "sigma_ratio": ("sigma_max", "nuclear_norm"),
    "effective_rank": ("effective_rank",),
    "effective_rank_fraction": ("effective_rank", "rank_bound"),
    "loss_normalised_norm": ("nuclear_norm", "loss"),
    "sum_loss_norm": ("nuclear_norm", "num_response_tokens"),
}
_MATRIX_COLUMNS = ("nuclear_norm", "sigma_max", "effective_rank", "rank_bound")


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
        projections: Measured projections, in the order of `PROJECTION_NAMES`.
        index_E: Position of each example in its data file, ascending.
        occurrence_E: How many earlier examples of the data file have the same instruction, those
            left out included: a skipped duplicate must not shift the pairing of the next one.
        example_ids, instructions, responses: Texts, one an example.
        loss_E: Nats per response token; NaN where unknown.
        response_tokens_E: Tokens that carry the loss; NaN where unknown.
        truncated_E: Cut at max_length: used, and counted. None where the file does not tell.
        column_ELP: The columns of the matrices table, NaN where null.
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
    loss_E: np.ndarray
    response_tokens_E: np.ndarray
    truncated_E: np.ndarray | None
    column_ELP: Mapping[str, np.ndarray]
    left_out: tuple[LeftOut, ...]

    @property
    def num_examples(self) -> int:
        """How many examples are in the arrays."""
        return len(self.index_E)

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
        """The set with some examples alone; the others are left out for `reason`.

        Args:
            keep: Boolean mask [E].
            reason: Why the others are not used.
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
            loss_E=self.loss_E[keep_E],
            response_tokens_E=self.response_tokens_E[keep_E],
            truncated_E=None if self.truncated_E is None else self.truncated_E[keep_E],
            column_ELP={name: column[keep_E] for name, column in self.column_ELP.items()},
            left_out=(*self.left_out, *out),
        )

    def values(self, statistic: str = "nuclear_norm") -> "Values":
        """A statistic of every example for which it is defined in every layer and projection.

        | statistic | value | undefined, so the example is left out |
        |---|---|---|
        | nuclear_norm | s, of the mean loss | never |
        | sigma_ratio | sigma_1 / s | s = 0 |
        | effective_rank | exp(entropy of sigma / s) | s < 1e-12 (null in the table) |
        | effective_rank_fraction | effective rank / rank_bound | as above |
        | loss_normalised_norm | s / loss | loss = 0 |
        | sum_loss_norm | s * response tokens: s of the summed loss | never |

        The gradient of the summed loss is the mean loss's times the number of response tokens, and
        so are its singular values: no new run is needed for it.

        Raises:
            UserError: No such statistic, or the run has a column it needs for no example, or it is
                defined for no example.
        """
        if statistic not in STATISTICS:
            raise UserError(f"No statistic {statistic!r}: there are {', '.join(STATISTICS)}.")
        column = dict(self.column_ELP)
        column["loss"] = self.loss_E[:, None, None]
        column["num_response_tokens"] = self.response_tokens_E[:, None, None]
        for name in STATISTICS[statistic]:
            if np.isnan(column[name]).all():
                raise UserError(
                    f"{self.label}: {name} was not measured, and {statistic} needs it. "
                    "Analyze the data again, or choose another statistic."
                )
        first, *second = (column[name] for name in STATISTICS[statistic])
        if not second:
            value_ELP = first
        elif statistic == "sum_loss_norm":
            value_ELP = first * second[0]
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                value_ELP = first / second[0]
        defined_E = np.isfinite(value_ELP).all(axis=(1, 2))
        if not defined_E.any():
            raise UserError(f"{self.label}: {statistic} is defined for none of its examples.")
        examples = self
        if not defined_E.all():
            examples = self.subset(defined_E, f"{statistic} undefined in a matrix")
        return Values(examples, statistic, value_ELP[defined_E])


@dataclass(frozen=True)
class Values:
    """A statistic of a set, all finite.

    Attributes:
        examples: The examples it is defined for; the others are in its `left_out`.
        statistic: Its name in `STATISTICS`.
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
        projections: Which ones; by default those of q, k, v, o that were measured, or where there
            are none of them all that belong to a layer.

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
    chosen = _choose(label, matrices, projections)
    matrices = matrices[matrices["projection"].isin(chosen)]
    ok = examples[examples["status"] == "ok"]
    dense, layers = _dense(label, matrices, ok["example_index"].to_numpy(), chosen)
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
        loss_E=used["loss"].to_numpy(np.float64),
        response_tokens_E=used["num_response_tokens"].to_numpy(np.float64, na_value=np.nan),
        truncated_E=truncated,
        column_ELP={name: column[keep_E] for name, column in dense.items()},
        left_out=left_out,
    )


def _texts(column: pd.Series) -> tuple[str | None, ...]:
    # A null in a column of strings is None or NaN, by pandas' version and what else is in it.
    return tuple(None if pd.isna(text) else text for text in column)


def _reason(row: Any, why: Mapping[int, str | None]) -> str:
    if row.status == "ok":
        return str(why[row.example_index])
    return row.status if pd.isna(row.reason) else f"{row.status}: {row.reason}"


def _choose(label: str, matrices: pd.DataFrame, asked: Sequence[str] | None) -> tuple[str, ...]:
    measured = [name for name in PROJECTION_NAMES if (matrices["projection"] == name).any()]
    if not measured:
        raise UserError(f"{label}: no matrix of a layer was measured.")
    if asked is None:
        return tuple(name for name in measured if name in ATTENTION) or tuple(measured)
    missing = [name for name in asked if name not in measured]
    if missing or not asked:
        raise UserError(
            f"{label}: {', '.join(missing) or 'no projection'} asked for, "
            f"{', '.join(measured)} measured."
        )
    return tuple(name for name in PROJECTION_NAMES if name in asked)


def _dense(
    label: str, matrices: pd.DataFrame, index_E: np.ndarray, projections: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """The columns as [E, L, P], and `present` (1.0 where the table has a row)."""
    matrices = matrices[matrices["example_index"].isin(index_E)]
    layer = matrices["layer"].to_numpy(np.int64)
    layers = np.unique(layer)
    shape = (len(index_E), len(layers), len(projections))
    place = np.ravel_multi_index(
        (
            pd.Index(index_E).get_indexer(matrices["example_index"]),
            np.searchsorted(layers, layer),
            pd.Index(projections).get_indexer(matrices["projection"]),
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
    for name in _MATRIX_COLUMNS:
        column = np.full(shape, np.nan)
        column.reshape(-1)[place] = matrices[name].to_numpy(np.float64, na_value=np.nan)
        dense[name] = column
    return dense, tuple(int(value) for value in layers)


def _reasons(
    ok: pd.DataFrame,
    dense: dict[str, np.ndarray],
    layers: tuple[int, ...],
    projections: tuple[str, ...],
) -> list[str | None]:
    """Why each ok example cannot be used, or None; takes `present` out of `dense`."""
    missing_E = (dense.pop("present") == 0).sum(axis=(1, 2))
    bad_E = (~np.isfinite(dense["nuclear_norm"])).sum(axis=(1, 2)) - missing_E
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
