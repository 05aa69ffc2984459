"""The weights that a checkpoint must hold, by its family's key table, and a source held against it."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from jaxgrad.checkpoints.prefixes import each_once, fit_names
from jaxgrad.checkpoints.sources import Tensors, WeightSource
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import parameter_shapes
from jaxgrad.models.families import Family, Key, expand_layers

COMPLETE = "take the config and all weights from the same download"
MERGE_FIRST = (
    "they are those of a PEFT model that is not merged: save its adapter by save_pretrained and give "
    "that directory, or save what merge_and_unload returns"
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight that a checkpoint must hold.

    Attributes:
        key: how it holds parameters.
        shape: its shape in the files.
        parameters: the decoder's parameters in it; several for a fused weight.
        sizes: outputs of each parameter.
        layer: its layer; None outside the layers.
    """

    key: Key
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    layer: int | None


class CanonicalSource:
    """A source whose weights have the names of their family's key table; others are left out.

    Prefixes of wrappers around the model (`prefixes`) are stripped if all weights fit then.

    Attributes:
        edits: what was stripped or added, in words; "" if nothing was.
        closest: the same where not all weights fit, but more of them do.

    Raises:
        UserError: two weights of the files have the same name in the table.
    """

    def __init__(self, source: Tensors, family: Family, config: DecoderConfig) -> None:
        self.where, self._source = source.where, source
        self.edits = self.closest = ""
        stored = source.shapes()
        plain = each_once(((family.canonical(name), name) for name in stored), source.where)
        self._names = plain
        if config.num_layers > len(stored):
            return  # refused by `check_weights`, and the table may be huge
        wanted, known = wanted_weights(config, family).keys(), known_names(config, family)
        if plain.keys() <= known:
            return
        fit = fit_names(stored, family, known, source.where)
        left, left_plain = (
            len(names.keys() - known) + len(wanted - names.keys()) for names in (fit.names, plain)
        )
        if left == 0:
            self._names, self.edits = fit.names, fit.edits
        elif left < left_plain:
            self._names, self.closest = fit.names, fit.edits

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight's name and shape, in the cheapest order to read."""
        shapes = self._source.shapes()
        return {canonical: shapes[name] for canonical, name in self._names.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives."""
        return self._source.dtype(self._names[name])

    def why_unreadable(self, name: str) -> str | None:
        """Why the tensor cannot be read as a weight; None if it can."""
        return self._source.why_unreadable(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """The values, in the dtype of the file."""
        return self._source.read(self._names[name])

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values; a large tensor comes in blocks of rows."""
        return self._source.read_blocks(self._names[name])

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the same values."""
        return self._source.read_part(self._names[name], part)

    def addition(self, name: str) -> None:
        """Nothing is added."""


def wanted_weights(config: DecoderConfig, family: Family) -> dict[str, Weight]:
    """The weights that a checkpoint must hold, by their names in the family's key table."""
    shapes = parameter_shapes(config)
    weights = {}
    for path, shape in shapes.items():
        key = family.keys[path]
        parameters = key.members or (path,)
        if path != parameters[0]:
            continue  # the first parameter of a fused weight stands for all
        stacked = "{layer}" in key.name
        sizes = tuple(shapes[member][stacked] for member in parameters)
        whole = (sum(sizes), *shape[1 + stacked :])
        whole = whole[::-1] if key.transposed else whole
        for layer, name in enumerate(expand_layers(key.name, config.num_layers)):
            weights[name] = Weight(key, whole, parameters, sizes, layer if stacked else None)
    return weights


def known_names(config: DecoderConfig, family: Family) -> frozenset[str]:
    """The names that files may hold: weights, a tied head's copy, buffers that the config implies."""
    return frozenset(
        {*wanted_weights(config, family), family.keys["lm_head.weight"].name}
        | _derived_names(config, family)
    )


def _derived_names(config: DecoderConfig, family: Family) -> set[str]:
    return {n for template in family.derived for n in expand_layers(template, config.num_layers)}


def check_weights(
    config: DecoderConfig, family: Family, source: WeightSource, *, closest: str = ""
) -> None:
    """Raise one `UserError` that names all weights that do not fit. Reads no values.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: the weights.
        closest: what of the names was stripped, though not all weights fit then (`CanonicalSource`).
    """
    shapes = source.shapes()
    if config.num_layers > len(shapes):
        raise UserError(
            f"{source.where}: the config has {config.num_layers} layers, but the files hold "
            f"{len(shapes)} weights; {COMPLETE}"
        )
    wanted = {name: weight.shape for name, weight in wanted_weights(config, family).items()}
    # A tied head may be in the files too, as a copy of the embedding (`_check_tied_head`).
    optional = {family.keys["lm_head.weight"].name: wanted[family.keys["embedding"].name]}
    allowed = wanted | (optional if config.tied_embeddings else {})
    derived = _derived_names(config, family)
    problems = {
        "missing": [name for name in wanted if name not in shapes],
        "misshapen": [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in allowed.items()
            if name in shapes and shapes[name] != shape
        ],
        "unreadable": [
            f"{name} {why}"
            for name in allowed
            if name in shapes and (why := source.why_unreadable(name)) is not None
        ],
        "not known": [name for name in sorted(shapes) if name not in allowed.keys() | derived],
    }
    counts = [
        f"{len(found)} {kind} ({'; '.join(found[:20])}{'; ...' if len(found) > 20 else ''})"
        for kind, found in problems.items()
        if found
    ]
    if counts:
        even = f", even with their names read {closest}" if closest else ""
        mend = MERGE_FIRST if any(_of_peft(name) for name in shapes) else COMPLETE
        raise UserError(
            f"{source.where}: the weights do not fit the config's {family.architecture}{even}: "
            f"{', '.join(counts)}; {mend}"
        )


def _of_peft(name: str) -> bool:
    """Whether a weight's name is one that PEFT gives inside a model that is not merged."""
    return not {"lora_A", "lora_B", "base_layer"}.isdisjoint(name.split("."))
