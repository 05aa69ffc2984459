"""The addresses of a table's matrices within their layers: the axis P."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from jaxgrad.projections import PROJECTION_NAMES, MatrixAddress


@dataclass(frozen=True)
class WithinLayer:
    """Where each row of a matrices table belongs within its layer.

    Attributes:
        addresses: The distinct ones, in the order of a layer; their layer is None.
        place: Which of them each row has, int64 [rows]; -1 for a projection that this version does not
            know.
    """

    addresses: tuple[MatrixAddress, ...]
    place: np.ndarray

    @property
    def words(self) -> tuple[str, ...]:
        """The addresses as one word each: "q", "up.3" (expert 3), "q.lora_A" (a part)."""
        return tuple(address.within_layer for address in self.addresses)

    @property
    def whole(self) -> tuple[MatrixAddress, ...]:
        """Those that are neither an expert's nor a part of a weight."""
        return tuple(one for one in self.addresses if one.expert is None and one.part is None)

    def word_of_each(self) -> np.ndarray:
        """The word of every row [rows]; None for an unknown projection."""
        return np.array([*self.words, None], object)[self.place]


def within_layer(matrices: pd.DataFrame) -> WithinLayer:
    """Reads the addresses off a matrices table.

    A table without the columns `expert` and `part`, as earlier versions wrote it, has whole weights alone.
    """
    columns = [_coded(matrices, name) for name in ("projection", "expert", "part")]
    shape = tuple(len(values) for _, values in columns)
    # A number for each distinct address; only those that occur are made.
    distinct, row = np.unique(
        np.ravel_multi_index([code for code, _ in columns], shape), return_inverse=True
    )
    found = []
    for codes in zip(*np.unravel_index(distinct, shape), strict=True):
        projection, expert, part = (
            values[code] for code, (_, values) in zip(codes, columns, strict=True)
        )
        found.append(MatrixAddress(None, projection, None if expert is None else int(expert), part))
    known = [k for k, address in enumerate(found) if address.projection in PROJECTION_NAMES]
    known.sort(key=lambda k: found[k].order)
    place = np.full(len(found), -1, np.int64)
    place[known] = np.arange(len(known))
    return WithinLayer(tuple(found[k] for k in known), place[row])


def _coded(matrices: pd.DataFrame, name: str) -> tuple[np.ndarray, list]:
    """A column as places in a list of its distinct values, the last of which is None for null."""
    if name not in matrices:
        return np.zeros(len(matrices), np.int64), [None]
    code, values = pd.factorize(matrices[name])
    return np.where(code < 0, len(values), code), [*values, None]
