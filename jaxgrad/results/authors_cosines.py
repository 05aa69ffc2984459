"""The similarities in the authors' JSONL (arXiv 2504.10766): two fields after a record's matrices.

    "cosine_sim": {"q_proj": {"layer_indices": [0, 1, ...], "matrix": [[1.0, ...], ...]}, "k_proj": ...}
    "cosine_sim_qkvo": {"0": {"q_proj_x_o_proj": 0.1, "k_proj_x_v_proj": 0.2}, "1": ...}

| in the file | here |
|---|---|
| row i of a projection's matrix | layer_cosines of its i-th measured layer |
| q_proj_x_o_proj of a layer | partner_cosine of its q and of its o |
| k_proj_x_v_proj of a layer | partner_cosine of its k and of its v |
| a projection or a pair that is not there | null: not measured |

The cosine with a zero gradient is 0 in their files (they add a small number to the denominator) and
undefined in ours. It is written as 0. It is read as undefined where the record has a gradient of zero. Only
q, k, v and o stand in these fields.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxgrad.errors import UserError
from jaxgrad.projections import ATTENTION, PARTNER_PAIRS

FIELDS = ("cosine_sim", "cosine_sim_qkvo")
_NAMES = {f"{name}_proj": name for name in ATTENTION}
_PAIRS = {f"{one}_proj_x_{other}_proj": (one, other) for one, other in PARTNER_PAIRS}

# Row of the matrices table by (projection, layer).
Rows = Mapping[tuple[str, int], dict[str, Any]]


def cosine_fields(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Both fields of one record; an empty dictionary where the example has no cosine.

    Args:
        rows: The example's rows of the matrices table, layers ascending.

    Raises:
        UserError: A matrix does not have one cosine for each layer of its projection.
    """
    attention = [row for row in rows if row["projection"] in _NAMES.values()]
    pairs_measured = any(not pd.isna(row["partner_cosine"]) for row in attention)
    if not pairs_measured and all(row["layer_cosines"] is None for row in attention):
        return {}
    over_layers = {}
    for name, projection in _NAMES.items():
        of_projection = [row for row in attention if row["projection"] == projection]
        lists = [row["layer_cosines"] for row in of_projection]
        if lists and all(values is not None for values in lists):
            over_layers[name] = {
                "layer_indices": [int(row["layer"]) for row in of_projection],
                "matrix": _written_matrix(of_projection),
            }
    place = {(row["projection"], int(row["layer"])): row for row in attention}
    in_layers: dict[str, dict[str, float]] = {
        str(layer): {} for layer in sorted({int(row["layer"]) for row in attention})
    }
    for layer, entry in in_layers.items():
        for name, pair in _PAIRS.items():
            one, two = (place.get((projection, int(layer))) for projection in pair)
            if not pairs_measured or one is None or two is None:
                continue
            value = float(one["partner_cosine"])
            if math.isfinite(value):
                entry[name] = value
            elif _is_zero(one) or _is_zero(two):
                entry[name] = 0.0
    return dict(zip(FIELDS, (over_layers, in_layers), strict=True))


def _written_matrix(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    for row in rows:
        if len(row["layer_cosines"]) != len(rows):
            raise UserError(
                f"Example {row['example_index']} has {len(row['layer_cosines'])} cosines of a matrix of "
                f"{row['projection']}, for {len(rows)} layers. Analyze the data again."
            )
    cosine_LL = np.array([row["layer_cosines"] for row in rows], np.float64)
    zero_L = np.array([_is_zero(row) for row in rows])
    cosine_LL[np.isnan(cosine_LL) & (zero_L[:, None] | zero_L)] = 0.0
    return cosine_LL.tolist()


def read_cosines(where: str, record: Mapping[str, Any], rows: Rows) -> list[str]:
    """Puts a record's cosines into its rows, as layer_cosines and partner_cosine.

    Args:
        where: File and line, for messages.
        record: The record; it may have either field, or none.
        rows: Its matrices' rows; the two columns are added to them.

    Returns:
        The fields that hold an infinite number.

    Raises:
        UserError: A field is not as described above, or has other layers than the record.
    """
    bad = []
    for field, read in zip(FIELDS, (_read_over_layers, _read_in_layers), strict=True):
        if field in record:
            value = record[field]
            if not isinstance(value, dict):
                raise UserError(f"{where}: {field} is not an object.")
            if not read(f"{where}, {field}", value, rows):
                bad.append(field)
    return bad


def _read_over_layers(where: str, value: dict[str, Any], rows: Rows) -> bool:
    finite = True
    for name, entry in value.items():
        if name not in _NAMES:
            raise UserError(f"{where}: has {name[:40]!r}, which is none of {', '.join(_NAMES)}.")
        if not isinstance(entry, dict) or set(entry) != {"layer_indices", "matrix"}:
            raise UserError(f"{where}: {name} is not an object of layer_indices and matrix.")
        layers = sorted(layer for projection, layer in rows if projection == _NAMES[name])
        if entry["layer_indices"] != layers:
            raise UserError(f"{where}: layer_indices are not the layers of the record's {name}.")
        cosine_LL = number_array(entry["matrix"])
        if cosine_LL is None or cosine_LL.shape != (len(layers), len(layers)):
            raise UserError(
                f"{where}: the matrix of {name} is not {len(layers)} x {len(layers)} numbers."
            )
        finite &= not np.isinf(cosine_LL).any()
        zero_L = np.array([_is_zero(rows[_NAMES[name], layer]) for layer in layers], bool)
        cosine_LL[zero_L[:, None] | zero_L] = np.nan
        for layer, cosine_L in zip(layers, cosine_LL, strict=True):
            rows[_NAMES[name], layer]["layer_cosines"] = cosine_L
    return finite


def _read_in_layers(where: str, value: dict[str, Any], rows: Rows) -> bool:
    finite = True
    # Layers are texts in the file. A text that names no layer finds nothing.
    place = {(projection, str(layer)): row for (projection, layer), row in rows.items()}
    for layer, entry in value.items():
        if not isinstance(entry, dict) or not set(entry) <= set(_PAIRS):
            raise UserError(
                f"{where}: layer {layer[:40]!r} is not an object of {' and '.join(_PAIRS)}."
            )
        for name, cosine in entry.items():
            number = number_array([cosine])
            if number is None or number.shape != (1,):
                raise UserError(f"{where}: {name} of layer {layer[:40]!r} is not a number.")
            one, two = (place.get((projection, layer)) for projection in _PAIRS[name])
            if one is None or two is None:
                raise UserError(
                    f"{where}: the record has not both weights of {name} in layer {layer[:40]!r}."
                )
            finite &= not np.isinf(number).any()
            if not np.isnan(number).any() and not (_is_zero(one) or _is_zero(two)):
                one["partner_cosine"] = two["partner_cosine"] = float(number[0])
    return finite


def number_array(values: Any) -> np.ndarray | None:
    """JSON lists of numbers as float64; None where they hold something else or differ in length."""
    if not isinstance(values, list):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" else None


def _is_zero(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) == 0 for name in ("nuclear_norm", "frobenius_norm"))
