"""A checkpoint's weights into the decoder: all checked before any is read, each read once.

The parameters are made on the device, empty; each tensor is read, cut into the parameters that it
holds, and written into its layer's place. Beside the parameters the host holds one tensor of a layer,
or one block of a larger one. On a mesh each device is sent what it holds of a block, and nothing else.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxgrad.checkpoints.sources import Fingerprint, WeightSource, row_blocks
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import (
    abstract_decoder,
    named_parameters,
    parameter_shapes,
    with_parameters,
)
from jaxgrad.models.families import Family, Key, expand_layers
from jaxgrad.models.sharding import parameter_shardings


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

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values, a large tensor's rows in blocks."""
        return self._source.read_blocks(self._names[name])


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
    dtypes: dict[str, np.dtype] = {}
    for name, weight in wanted_weights(config, family).items():
        dtype = source.dtype(name)
        for parameter in weight.parameters:
            dtypes[parameter] = _that_holds_both(dtypes.get(parameter, dtype), dtype)
    return dtypes


def _that_holds_both(one: np.dtype, other: np.dtype) -> np.dtype:
    """The smallest float that holds the values of both; NumPy knows none for float16 and bfloat16."""
    if one == other:
        return one
    return np.dtype(np.float64 if np.float64 in (one, other) else np.float32)


class Part(NamedTuple):
    """Values of a parameter: a layer's, or (None) those of one outside the layers; from `row` on."""

    parameter: str
    layer: int | None
    row: int
    values: np.ndarray


class Block(NamedTuple):
    """Values of a weight of the files, of which `shape` is the whole, and the parts in them."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    parts: list[Part]


def read_parts(
    config: DecoderConfig, family: Family, source: WeightSource, *, progress: bool, label: str
) -> Iterator[Block]:
    """Every weight in the order of the files, in blocks.

    A weight that holds several parameters, or lies transposed, is one block.

    Raises:
        UserError: a weight cannot be read.
    """
    wanted = wanted_weights(config, family)
    names = [name for name in source.shapes() if name in wanted]
    total = sum(math.prod(wanted[name].shape) * source.dtype(name).itemsize for name in names)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
        for name in names:
            weight, row = wanted[name], 0
            if weight.key.is_plain:
                for values in source.read_blocks(name):
                    part = Part(weight.parameters[0], weight.layer, row, values)
                    yield Block(name, weight.shape, values, [part])
                    row += len(values)
                    bar.update(values.nbytes)
                continue
            values = source.read(name)
            split = weight.key.split(values, weight.sizes, config.num_heads)
            pairs = zip(weight.parameters, split, strict=True)
            parts = [Part(parameter, weight.layer, 0, part) for parameter, part in pairs]
            yield Block(name, weight.shape, values, parts)
            bar.update(values.nbytes)


def fill_decoder(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> tuple[nnx.GraphDef, nnx.State, str]:
    """Read every weight of the decoder from `source`, tensor by tensor, each once.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: where they are.
        dtype: of the parameters; None for that of the files (`stored_dtypes`).
        mesh: where the parameters go, split as `jaxgrad.models.sharding` has it; None for one device.
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
    shapes = named_parameters(abstract)
    places = {} if mesh is None else parameter_shardings(config, shapes, mesh)
    parameters = {
        name: _Parameter(value.shape, stored.get(name, dtype), places.get(name))
        for name, value in shapes.items()
    }
    fingerprint = Fingerprint()
    for block in read_parts(config, family, source, progress=progress, label="weights"):
        fingerprint.add(block.name, block.shape, block.values)
        for part in block.parts:
            parameters[part.parameter].write(part)
    arrays = {name: parameter.array() for name, parameter in parameters.items()}
    if config.tied_embeddings:
        _check_tied_head(family, source, arrays["embedding"])
    return graphdef, with_parameters(abstract, arrays), fingerprint.hexdigest()


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
    arrays = named_parameters(state)
    for block in read_parts(config, family, source, progress=progress, label="compared"):
        for part in block.parts:
            array = arrays[part.parameter]
            layer = array if part.layer is None else array[part.layer]
            written = np.asarray(layer[part.row : part.row + len(part.values)])
            if written.tobytes() != part.values.astype(array.dtype).tobytes():
                raise UserError(
                    f"{where}: {block.name} did not come back as it was written; the disk or the memory "
                    "is at fault: try again elsewhere"
                )


def _check_tied_head(family: Family, source: WeightSource, embedding_VD: jax.Array) -> None:
    """Raise where the files hold a head that is not the embedding to which the config ties it."""
    head, embedding = family.keys["lm_head.weight"].name, family.keys["embedding"].name
    row = 0
    for block in source.read_blocks(head) if head in source.shapes() else ():
        rows = np.asarray(embedding_VD[row : row + len(block)])
        row += len(block)
        if not np.array_equal(block.astype(rows.dtype), rows):
            raise UserError(
                f"{source.where}: {head} differs from {embedding}, to which the config ties it "
                "(tie_word_embeddings); correct the config, or remove the weight that is not meant"
            )


# Donated: the piece is changed in its place, not copied.
_update = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


class _Parameter:
    """A parameter that is being written: a piece on each of its devices, zeros at first.

    Args:
        shape: of the whole.
        dtype: of its values.
        sharding: where its pieces lie; None for all of it on the default device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> None:
        self._shape, self._sharding = shape, sharding
        if sharding is None:
            whole = jnp.zeros(shape, dtype)
            self._pieces = [(tuple((0, size) for size in shape), whole)]
            return
        self._pieces = []
        for device, index in sharding.devices_indices_map(shape).items():
            bounds = tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))
            sizes = tuple(end - begin for begin, end in bounds)
            with jax.default_device(device):  # made there: not on the first device and then moved
                piece = jax.device_put(jnp.zeros(sizes, dtype), device)
            self._pieces.append((bounds, piece))

    def write(self, part: Part) -> None:
        """Put a part into its place, in blocks."""
        layer = () if part.layer is None else (part.layer,)
        dtype = self._pieces[0][1].dtype
        for begin, end in row_blocks(part.values.shape, dtype.itemsize):
            block = part.values[begin:end].astype(dtype)
            block = block.reshape(*[1] * len(layer), *block.shape)
            start = (*layer, part.row + begin, *[0] * (part.values.ndim - 1))
            self._pieces = [
                (bounds, _written(piece, bounds, block, start)) for bounds, piece in self._pieces
            ]
            # Waiting keeps the queue, and with it the memory, at one block.
            jax.block_until_ready([piece for _, piece in self._pieces])

    def array(self) -> jax.Array:
        """The pieces as one array."""
        pieces = [piece for _, piece in self._pieces]
        if self._sharding is None:
            return pieces[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, pieces)


def _written(
    piece: jax.Array, bounds: tuple[tuple[int, int], ...], block: np.ndarray, start: tuple[int, ...]
) -> jax.Array:
    """A piece, which stands at `bounds` of its parameter, with what it has of a block at `start`."""
    cuts, place = [], []
    for (low, high), offset, size in zip(bounds, start, block.shape, strict=True):
        begin, end = max(low, offset), min(high, offset + size)
        if begin >= end:
            return piece
        cuts.append(slice(begin - offset, end - offset))
        place.append(begin - low)
    return _update(piece, block[tuple(cuts)], np.asarray(place, np.int32))
