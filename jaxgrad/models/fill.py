"""A checkpoint's weights into the decoder: all checked before any is read, each read once.

The parameters are made on the device, empty; each tensor is read, cut into the parameters that it
holds, and written into its layer's place in blocks. Beside the parameters the host holds one tensor
of the file and one block.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.models.families import Family, Key, expand_layers
from jaxgrad.models.sources import Fingerprint, WeightSource

BLOCK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint, as the config wants it.

    Attributes:
        shape: as the checkpoint holds it.
        parameters: the decoder's parameters that it holds.
        sizes: outputs of each.
        layer: whose it is; None outside the layers.
    """

    key: Key
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    layer: int | None


class CanonicalSource:
    """A source under the names of its family's table; what is not the decoder's is left out.

    Raises:
        UserError: two weights of the files stand for the same one.
    """

    def __init__(self, source: WeightSource, family: Family) -> None:
        self.where, self._source = source.where, source
        self._names: dict[str, str] = {}
        for name in source.shapes():
            canonical = family.canonical(name)
            if canonical is None:
                continue
            if canonical in self._names:
                raise UserError(
                    f"{self.where}: {name} and {self._names[canonical]} are the same weight; "
                    "a checkpoint must hold each weight once: remove the one that is not meant"
                )
            self._names[canonical] = name

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order in which reading is cheapest."""
        shapes = self._source.shapes()
        return {canonical: shapes[name] for canonical, name in self._names.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives."""
        return self._source.dtype(self._names[name])

    def why_unreadable(self, name: str) -> str | None:
        """What keeps the tensor's values from being weights; None where nothing does."""
        return self._source.why_unreadable(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, in the dtype of the file."""
        return self._source.read(self._names[name])


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters, "layers.attention.q.weight", stacked over layers."""
    _, abstract = abstract_decoder(config, jnp.float32)
    flat = nnx.to_flat_state(abstract)
    return {".".join(map(str, path)): leaf.get_value().shape for path, leaf in flat}


def wanted_weights(config: DecoderConfig, family: Family) -> dict[str, Weight]:
    """The weights that a checkpoint must hold, by the names of the family's table."""
    shapes = parameter_shapes(config)
    weights = {}
    for path, shape in shapes.items():
        key = family.keys[path]
        parameters = key.members or (path,)
        if path != parameters[0]:
            continue  # comes with the first of its group
        stacked = "{layer}" in key.name
        sizes = tuple(shapes[member][stacked] for member in parameters)
        whole = (sum(sizes), *shape[1 + stacked :])
        whole = whole[::-1] if key.transposed else whole
        for layer, name in enumerate(expand_layers(key.name, config.num_layers)):
            place = layer if stacked else None
            weights[name] = Weight(key, whole, parameters, sizes, place)
    return weights


def check_weights(config: DecoderConfig, family: Family, source: WeightSource) -> None:
    """Raise one `UserError` for all weights that do not fit, before any is read."""
    source = CanonicalSource(source, family)
    shapes = source.shapes()
    if config.num_layers > len(shapes):
        raise UserError(
            f"{source.where}: the config has {config.num_layers} layers, but the files hold "
            f"{len(shapes)} weights; get the config and the weights from one place, whole"
        )
    wanted = {name: weight.shape for name, weight in wanted_weights(config, family).items()}
    # A tied head may be there as a copy of the embedding (`_check_tied_head`).
    optional = {family.keys["lm_head.weight"].name: wanted[family.keys["embedding"].name]}
    allowed = wanted | (optional if config.tied_embeddings else {})
    derived = {n for template in family.derived for n in expand_layers(template, config.num_layers)}
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
    told = [
        f"{len(found)} {kind} ({'; '.join(found[:20])}{'; ...' if len(found) > 20 else ''})"
        for kind, found in problems.items()
        if found
    ]
    if told:
        raise UserError(
            f"{source.where}: the weights do not fit the config's {family.architecture}: "
            f"{', '.join(told)}; get the config and the weights from one place, whole"
        )


def stored_dtypes(
    config: DecoderConfig, family: Family, source: WeightSource
) -> dict[str, np.dtype]:
    """Each parameter's dtype in the files; where its layers differ, the one that holds them all."""
    source = CanonicalSource(source, family)
    dtypes: dict[str, np.dtype] = {}
    for name, weight in wanted_weights(config, family).items():
        dtype = source.dtype(name)
        for parameter in weight.parameters:
            dtypes[parameter] = np.promote_types(dtypes.get(parameter, dtype), dtype)
    return dtypes


class Part(NamedTuple):
    """A parameter's values for one layer (None: the whole parameter), outputs first."""

    parameter: str
    layer: int | None
    values: np.ndarray


def read_parts(
    config: DecoderConfig, family: Family, source: WeightSource, *, progress: bool, label: str
) -> Iterator[tuple[str, np.ndarray, list[Part]]]:
    """Every weight in the order of the files: its name, its values, and the parts in it.

    A tied head, where the files hold it as a copy, is compared with the embedding and not given.

    Raises:
        UserError: a weight cannot be read; a tied head is not the embedding.
    """
    source = CanonicalSource(source, family)
    wanted = wanted_weights(config, family)
    names = [name for name in source.shapes() if name in wanted]
    total = sum(math.prod(wanted[name].shape) * source.dtype(name).itemsize for name in names)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
        for name in names:
            weight, values = wanted[name], source.read(name)
            if name == family.keys["embedding"].name and config.tied_embeddings:
                _check_tied_head(family, source, values)
            split = weight.key.split(values, weight.sizes, config.num_heads)
            pairs = zip(weight.parameters, split, strict=True)
            yield name, values, [Part(parameter, weight.layer, part) for parameter, part in pairs]
            bar.update(values.nbytes)


def fill_decoder(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    dtype: Any,
    *,
    progress: bool = False,
) -> tuple[nnx.GraphDef, nnx.State, str]:
    """Read every weight of the decoder from `source`, tensor by tensor, each once.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: where they are.
        dtype: of the parameters; None for that of the files (`stored_dtypes`).
        progress: show a bar on stderr.

    Returns:
        graphdef, state, fingerprint of the weights as they stand in the files. The copy of a tied
        embedding that a file may hold as its head is compared, and not counted.

    Raises:
        UserError: weights that are unknown, missing, of another shape or of an integer type, all in
            one message; a head that is not the embedding which the config ties it to.
    """
    check_weights(config, family, source)
    stored = stored_dtypes(config, family, source) if dtype is None else {}
    graphdef, abstract = abstract_decoder(config, dtype or np.float32)
    flat = nnx.to_flat_state(abstract)
    names = [".".join(map(str, path)) for path, _ in flat]
    arrays = {
        name: jnp.zeros(leaf.get_value().shape, stored.get(name, dtype))
        for name, (_, leaf) in zip(names, flat, strict=True)
    }
    fingerprint = Fingerprint()
    for name, values, parts in read_parts(
        config, family, source, progress=progress, label="weights"
    ):
        fingerprint.add(name, values)
        for part in parts:
            arrays[part.parameter] = _write(arrays[part.parameter], part)
    filled = [
        (path, leaf.replace(arrays[name])) for name, (path, leaf) in zip(names, flat, strict=True)
    ]
    return graphdef, nnx.from_flat_state(filled), fingerprint.hexdigest()


def compare_with_source(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    state: nnx.State,
    *,
    where: str,
    progress: bool = False,
) -> None:
    """Raise a `UserError` unless every parameter holds, bit by bit, what the source holds.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: read once more.
        state: parameters in the dtypes of `stored_dtypes`.
        where: their place, for the message.
        progress: show a bar on stderr.
    """
    arrays = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    for name, _, parts in read_parts(config, family, source, progress=progress, label="compared"):
        for part in parts:
            array = arrays[part.parameter]
            written = np.asarray(array if part.layer is None else array[part.layer])
            if written.tobytes() != part.values.astype(array.dtype).tobytes():
                raise UserError(
                    f"{where}: {name} did not come back as it was written; the disk or the memory "
                    "is at fault: try again elsewhere"
                )


def _check_tied_head(family: Family, source: WeightSource, embedding_VD: np.ndarray) -> None:
    head, embedding = family.keys["lm_head.weight"].name, family.keys["embedding"].name
    if head in source.shapes() and not np.array_equal(source.read(head), embedding_VD):
        raise UserError(
            f"{source.where}: {head} differs from {embedding}, to which the config ties it "
            "(tie_word_embeddings); correct the config, or remove the weight that is not meant"
        )


# Donated: the parameter is changed in its place, not copied.
_update = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def _write(parameter: jax.Array, part: Part) -> jax.Array:
    """The parameter with a part in its place, in blocks of rows."""
    values, layer = part.values, part.layer
    rows = max(1, BLOCK_BYTES // max(1, values[0].size * parameter.dtype.itemsize))
    for begin in range(0, len(values), rows):
        block = values[begin : begin + rows].astype(parameter.dtype)
        start: tuple[int, ...] = (begin, *[0] * (values.ndim - 1))
        if layer is not None:
            block, start = block[None], (layer, *start)
        # Waiting keeps the queue, and with it the memory, at one block.
        parameter = _update(parameter, block, np.asarray(start, np.int32)).block_until_ready()
    return parameter
