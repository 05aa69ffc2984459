"""The authors' JSONL, field for field.

One line for each measured example: instruction, output, loss, then one object for each matrix under its
Hugging Face parameter name. Layers are in order, inside a layer q, k, v, o (gate, up, down). lm_head is
last.

| in the file | here |
|---|---|
| M_mean, M_max, M_min | entry_mean, entry_max, entry_min |
| frobenius_norm | frobenius_norm |
| S_sum, S_max, S_min (arXiv 2410.23743) | nuclear_norm, sigma_max, sigma_min |
| S_list instead (arXiv 2504.10766) | singular_values, with zeros up to min(rows, cols) |

The form with S_list ends in the similarities, where they were measured: see `authors_cosines`.

The files hold gradients of the mean loss over the response, by whole weights. They have no name for another
loss, an expert or a part of a weight. They do not say how they were made either: of a run that is read from
one, the model, its number of layers, the protocol, the tokens and the skipped examples are unknown. Its
examples are numbered as they stand in the file.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from jaxgrad.errors import UserError
from jaxgrad.projections import ATTENTION, HEAD, MLP, PROJECTION_NAMES, MatrixAddress
from jaxgrad.results.authors_cosines import FIELDS, cosine_fields, number_array, read_cosines
from jaxgrad.results.losses import RESPONSE_MEAN, loss_of
from jaxgrad.results.read import Results, results_of
from jaxgrad.results.schema import EXAMPLES_SCHEMA, MATRICES_SCHEMA, storable
from jaxgrad.results.storage import atomic_file_at

_BLOCKS = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(MLP, "mlp")
_ENTRIES = {
    "M_mean": "entry_mean",
    "M_max": "entry_max",
    "M_min": "entry_min",
    "frobenius_norm": "frobenius_norm",
}
_SUMMARY = {"S_sum": "nuclear_norm", "S_max": "sigma_max", "S_min": "sigma_min"}
_PARAMETER = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>\w+)\.(?P<name>\w+)_proj\.weight",
    re.ASCII,
)
# Below it the follow-up paper's scripts leave the effective rank out.
_LEAST_NUCLEAR_NORM = 1e-12


def write_authors_jsonl(
    results: Results | Iterable[Results], path: str | Path, *, with_spectrum: bool = False
) -> int:
    """Writes the examples with status ok; the file appears whole or not at all.

    Args:
        results: A run, or `iter_results(...)` to hold one window at a time.
        path: The file to write, a path or a URL.
        with_spectrum: The follow-up's form: S_list in place of S_sum, S_max and S_min, and the
            cosines where the run has them.

    Returns:
        The number of lines.

    Raises:
        UserError: The run's loss is another, it has experts or parts of weights, a statistic that the
            form needs was not measured, or the file cannot be written.
    """
    parts = [results] if isinstance(results, Results) else results
    count = 0
    with atomic_file_at(path) as file:
        for part in parts:
            refuse_other_loss(loss_of(part.run))
            for record in _records(part, with_spectrum):
                file.write(json.dumps(record).encode() + b"\n")
                count += 1
    return count


def refuse_other_loss(loss: str) -> None:
    """Refuses what these files cannot hold, before anything is computed or written.

    Args:
        loss: A name as --loss takes it; of a run, what `loss_of` says.

    Raises:
        UserError: It is not the mean over the response.
    """
    if loss != RESPONSE_MEAN:
        raise UserError(
            "The authors' files hold gradients of the mean loss over the response "
            f"(--loss={RESPONSE_MEAN}), not of --loss={loss}. Keep the run's Parquet files, or measure "
            f"with --loss={RESPONSE_MEAN}."
        )


def _records(results: Results, with_spectrum: bool) -> Iterator[dict[str, Any]]:
    matrices = dict(iter(results.matrices.groupby("example_index", sort=False)))
    measured = results.examples[results.examples["status"] == "ok"]
    for example in measured.to_dict("records"):
        record = {"instruction": example["instruction"], "output": example["response"]}
        record["loss"] = float(example["loss"])
        rows = matrices.get(example["example_index"], results.matrices[:0]).to_dict("records")
        rows.sort(key=_order)
        for row in rows:
            record[_parameter_name(row)] = _statistics(row, with_spectrum)
        if with_spectrum:
            record |= cosine_fields(rows)
        yield record


def _order(row: dict[str, Any]) -> tuple:
    """Sorts an example's rows; refuses those that have no name in these files."""
    _parameter_name(row)
    layer = None if row["projection"] == HEAD else int(row["layer"])
    return MatrixAddress(layer, row["projection"]).order


def _parameter_name(row: dict[str, Any]) -> str:
    projection = row["projection"]
    for what in ("expert", "part"):
        if not pd.isna(row.get(what)):
            raise UserError(
                f"The authors' files have no name for an expert or a part of a weight: this run has "
                f"{what} {row[what]} of {projection}. Keep the run's Parquet files."
            )
    if projection == HEAD:
        return f"{HEAD}.weight"
    if projection not in _BLOCKS:
        raise UserError(
            f"The authors' files have no name for the projection {projection!r}; "
            f"they know {', '.join(PROJECTION_NAMES)}."
        )
    return f"model.layers.{row['layer']}.{_BLOCKS[projection]}.{projection}_proj.weight"


def _statistics(row: dict[str, Any], with_spectrum: bool) -> dict[str, Any]:
    wanted = _ENTRIES if with_spectrum else _ENTRIES | _SUMMARY
    missing = [name for name, column in wanted.items() if pd.isna(row[column])]
    if with_spectrum and row["singular_values"] is None:
        missing.append("S_list")
    if missing:
        mend = "Measure them in a new run"
        if {"M_max", "M_min"} & set(missing):
            mend += " with --extremes"
        if "S_list" in missing:
            mend += " that keeps the singular values"
        raise UserError(
            f"The authors' form needs {', '.join(missing)}, which this run does not have "
            f"(example {row['example_index']}, {_parameter_name(row)}). {mend}."
        )
    statistics: dict[str, Any] = {name: float(row[column]) for name, column in wanted.items()}
    if with_spectrum:
        spectrum = [float(value) for value in row["singular_values"]]
        if not pd.isna(row["rows"]) and not pd.isna(row["cols"]):
            # Ours end at the rank bound. The authors' SVD has min(rows, cols) values: the rest are zero.
            spectrum += [0.0] * (min(row["rows"], row["cols"]) - len(spectrum))
        statistics["S_list"] = spectrum
    return statistics


def read_authors_jsonl(path: str | Path, *, with_spectrum: bool = True) -> Results:
    """Reads a file of either form; what it does not have is null.

    Examples are numbered as they stand in the file; an example's id is its number as text. From S_list
    come singular_values, nuclear_norm, sigma_max, sigma_min and effective_rank (exp of the entropy; null
    when the nuclear norm is below 1e-12). An example with a number that is not finite has the status
    non_finite.

    Args:
        path: The file.
        with_spectrum: Keep S_list as singular_values. A 7B model has up to 4096 of them a matrix.

    Raises:
        UserError: The file cannot be read, has no record, or a line is not such a record; the line
            is named.
    """
    path = Path(path)
    examples: dict[str, list] = {name: [] for name in EXAMPLES_SCHEMA.names}
    matrices: dict[str, list] = {name: [] for name in MATRICES_SCHEMA.names}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                index = len(examples["example_index"])
                example, rows = _read_line(f"{path}, line {number}", line)
                for column, values in examples.items():
                    values.append(index if column == "example_index" else example.get(column))
                for row in rows:
                    row["example_index"] = index
                    if not with_spectrum:
                        row.pop("singular_values", None)
                    for column, values in matrices.items():
                        values.append(row.get(column))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if not examples["example_index"]:
        raise UserError(f"{path} is empty: it should have a line for every example.")
    examples["example_id"] = [str(index) for index in examples["example_index"]]
    return results_of(
        {"authors_jsonl": str(path)},
        pa.Table.from_pydict(examples, schema=EXAMPLES_SCHEMA),
        pa.Table.from_pydict(matrices, schema=MATRICES_SCHEMA),
    )


def _read_line(where: str, line: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A record's row of the examples table and its rows of the matrices table, without indices."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object.")
    loss = _number(where, record, "loss")
    wrong = [] if math.isfinite(loss) else ["loss"]
    rows = []
    for name, entry in record.items():
        if name in ("instruction", "output", "loss", *FIELDS):
            continue
        rows.append(_matrix_row(f"{where}, {_shown(name)}", name, entry))
        if not _all_finite(rows[-1]):
            wrong.append(name)
    layered = {(row["projection"], row["layer"]): row for row in rows if row["layer"] is not None}
    wrong += read_cosines(where, record, layered)
    example = {
        "loss": loss,
        "status": "non_finite" if wrong else "ok",
        "reason": f"not finite in the file: {', '.join(wrong)}" if wrong else None,
        "instruction": _text(where, record, "instruction"),
        "response": _text(where, record, "output"),
    }
    return example, rows


def _shown(name: str) -> str:
    """A field's name for a message of one line: it may be any text."""
    return name if len(name) <= 80 and name.isprintable() else f"{name[:80]!r}..."


def _text(where: str, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is not a text.")
    return storable(value)


def _number(where: str, record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} is not a number.")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _matrix_row(where: str, name: str, entry: Any) -> dict[str, Any]:
    match = _PARAMETER.fullmatch(name)
    if match and _BLOCKS.get(match["name"]) != match["block"]:
        match = None
    if not isinstance(entry, dict) or not (match or name == f"{HEAD}.weight"):
        raise UserError(f"{where}: neither a known field nor a known weight with its statistics.")
    unknown = sorted(set(entry) - {*_ENTRIES, *_SUMMARY, "S_list"})
    if unknown:
        raise UserError(f"{where}: no such statistic: {', '.join(unknown)}.")
    row: dict[str, Any] = {"layer": None, "projection": HEAD}
    if match:
        row = {"layer": int(match["layer"]), "projection": match["name"]}
    for field, column in (_ENTRIES | _SUMMARY).items():
        if field in entry:
            row[column] = _number(where, entry, field)
    if "S_list" in entry:
        row |= _of_spectrum(where, entry["S_list"])
    return row


def _of_spectrum(where: str, values: Any) -> dict[str, Any]:
    sigma = number_array(values)
    if sigma is None or sigma.ndim != 1 or sigma.size == 0:
        raise UserError(f"{where}: S_list is not a list of numbers.")
    total = float(sigma.sum())
    row: dict[str, Any] = {"singular_values": sigma, "nuclear_norm": total}
    row |= {"sigma_max": float(sigma.max()), "sigma_min": float(sigma.min())}
    if math.isfinite(total) and total >= _LEAST_NUCLEAR_NORM:
        p = sigma[sigma > 0] / total
        row["effective_rank"] = float(np.exp(-np.sum(p * np.log(p))))
    return row


def _all_finite(row: dict[str, Any]) -> bool:
    numbers = [value for value in row.values() if isinstance(value, float)]
    return all(map(math.isfinite, numbers))
