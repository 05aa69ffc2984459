"""Fills the decoder with a checkpoint's weights. All names and shapes are checked before any is read.

The parameters are made on the device, as zeros. Each weight is read once, split if it is fused, and
written to its layer. Besides the parameters, the host holds one weight of a layer, or one block of a
larger one. On a mesh, each device gets only its share of each block.

On a mesh that spans processes each reads what its own devices need of a weight, and of some weights the
rest, too: the fingerprint covers all values, so the processes divide the weights, and tell each other the
digests. Fused and transposed weights are read whole.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxgrad.checkpoints.key_table import Weight, check_weights, wanted_weights
from jaxgrad.checkpoints.sources import Fingerprint, WeightSource, row_blocks
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import (
    abstract_decoder,
    named_parameters,
    with_parameters,
)
from jaxgrad.models.families import Family
from jaxgrad.models.sharding import parameter_shardings
from jaxgrad.processes.exchange import Exchange

# A slice along each axis of a weight.
Part = tuple[slice, ...]


def stored_dtypes(
    config: DecoderConfig, family: Family, source: WeightSource
) -> dict[str, np.dtype]:
    """Each parameter's dtype in the files; if its layers differ, the smallest that holds all exactly."""
    dtypes: dict[str, np.dtype] = {}
    for name, weight in wanted_weights(config, family).items():
        dtype = source.dtype(name)
        for parameter in weight.parameters:
            dtypes[parameter] = _common_float(dtypes.get(parameter, dtype), dtype)
    return dtypes


def _common_float(one: np.dtype, other: np.dtype) -> np.dtype:
    """The smallest float that holds both exactly. (NumPy has none for float16 and bfloat16.)"""
    if one == other:
        return one
    return np.dtype(np.float64 if np.float64 in (one, other) else np.float32)


class ParameterSlice(NamedTuple):
    """Consecutive rows of a parameter, or of one layer of it.

    Attributes:
        parameter: its name.
        layer: the layer; None for a parameter outside the layers.
        first_row: index of the first row.
        values: the rows.
        first_column: index of the first column, where the rows are not whole.
    """

    parameter: str
    layer: int | None
    first_row: int
    values: np.ndarray
    first_column: int = 0


class WeightBlock(NamedTuple):
    """Consecutive rows of a weight in the files.

    Attributes:
        name: the weight's, or of a part of its adapter.
        shape: of the whole weight.
        values: the rows, as stored; None where they are only a part of what the fingerprint covers.
        slices: the rows by parameter, with what an adapter adds; empty for a part of an adapter.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray | None
    slices: list[ParameterSlice]


def read_weights(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    *,
    progress: bool,
    label: str,
    parts: Mapping[str, list[Part]] | None = None,
) -> Iterator[WeightBlock]:
    """All weights in the order of the files, block by block.

    A fused or transposed weight is one block. After a weight with an adapter come the adapter's parts.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: the weights.
        progress: show a bar on stderr.
        label: of the bar.
        parts: weights of which only these parts are wanted, and no values for the fingerprint.

    Raises:
        UserError: a weight cannot be read.
    """
    wanted = wanted_weights(config, family)
    names = [name for name in source.shapes() if name in wanted]
    total = sum(math.prod(wanted[name].shape) * source.dtype(name).itemsize for name in names)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
        for name in names:
            weight, row = wanted[name], 0
            addition = source.addition(name)
            if name in (parts or {}):
                yield from _parts_of(config, source, name, weight, (parts or {})[name])
                bar.update(math.prod(weight.shape) * source.dtype(name).itemsize)
                continue
            if weight.key.is_plain:
                for stored in source.read_blocks(name):
                    values = stored if addition is None else addition.added_to(row, stored)
                    rows = ParameterSlice(weight.parameters[0], weight.layer, row, values)
                    yield WeightBlock(name, weight.shape, stored, [rows])
                    row += len(values)
                    bar.update(values.nbytes)
            else:
                stored = source.read(name)
                values = stored if addition is None else addition.added_to(0, stored)
                yield WeightBlock(name, weight.shape, stored, _split(config, weight, values))
                bar.update(values.nbytes)
            for part, values in () if addition is None else addition.parts(name):
                yield WeightBlock(part, values.shape, values, [])


def _split(config: DecoderConfig, weight: Weight, values: np.ndarray) -> list[ParameterSlice]:
    """A fused or transposed weight as the parameters in it."""
    split = weight.key.split(values, weight.sizes, config.num_heads)
    pairs = zip(weight.parameters, split, strict=True)
    return [ParameterSlice(member, weight.layer, 0, rows) for member, rows in pairs]


def _parts_of(
    config: DecoderConfig, source: WeightSource, name: str, weight: Weight, parts: list[Part]
) -> Iterator[WeightBlock]:
    """Parts of a weight, in blocks of rows. With an adapter's addition the rows are whole."""
    addition = source.addition(name)
    if not weight.key.is_plain:
        stored = source.read(name)
        values = stored if addition is None else addition.added_to(0, stored)
        yield WeightBlock(name, weight.shape, None, _split(config, weight, values))
        return
    for rows, *columns in parts:
        if addition is not None:
            columns = [slice(0, size) for size in weight.shape[1:]]
        sizes = tuple(cut.stop - cut.start for cut in (rows, *columns))
        first_column = columns[0].start if columns else 0
        for begin, end in row_blocks(sizes, source.dtype(name).itemsize):
            row = rows.start + begin
            values = source.read_part(name, (slice(row, rows.start + end), *columns))
            if addition is not None:
                values = addition.added_to(row, values)
            found = ParameterSlice(weight.parameters[0], weight.layer, row, values, first_column)
            yield WeightBlock(name, weight.shape, None, [found])


def fill_decoder(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
    exchange: Exchange | None = None,
) -> tuple[nnx.GraphDef, nnx.State, str]:
    """Read the decoder's weights from `source`, each once.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: the weights.
        dtype: of the parameters; None for that of the files (`stored_dtypes`).
        mesh: the devices that get them, split by `jaxgrad.models.sharding`; None for one device.
        progress: show a bar on stderr.
        exchange: of the processes that a mesh spans, all of which make this call; with it they share the
            reading.

    Returns:
        graphdef, state, fingerprint of the weights as stored in the files, and of what an adapter adds. A
        head in the files that the config ties is compared with the embedding, and is not in the
        fingerprint.

    Raises:
        UserError: weights are unknown, missing, of another shape or of an integer type, all in one
            message; a tied head differs from the embedding.
    """
    check_weights(config, family, source)
    stored = stored_dtypes(config, family, source) if dtype is None else {}
    graphdef, abstract = abstract_decoder(config, dtype or np.float32)
    shapes = named_parameters(abstract)
    shardings = {} if mesh is None else parameter_shardings(config, shapes, mesh)
    parameters = {
        name: _Parameter(value.shape, stored.get(name, dtype), shardings.get(name))
        for name, value in shapes.items()
    }
    fingerprint, wanted, parts = Fingerprint(), wanted_weights(config, family), {}
    if exchange is not None:
        parts = {
            name: parameters[wanted[name].parameters[0]].parts(wanted[name].layer is not None)
            for name in _hashed_elsewhere(exchange, source, wanted)
        }
    for block in read_weights(
        config, family, source, progress=progress, label="weights", parts=parts
    ):
        if block.values is not None:
            fingerprint.add(block.name, block.shape, block.values)
        for rows in block.slices:
            parameters[rows.parameter].write(rows)
    if exchange is not None:
        for digests in exchange.gather(fingerprint.by_tensor()):
            fingerprint.add_others(digests)
    arrays = {name: parameter.array() for name, parameter in parameters.items()}
    if config.tied_embeddings:
        _check_tied_head(family, source, arrays["embedding"])
    return graphdef, with_parameters(abstract, arrays), fingerprint.hexdigest()


def _hashed_elsewhere(
    exchange: Exchange, source: WeightSource, wanted: Mapping[str, Weight]
) -> list[str]:
    """The weights that other processes read whole, for the fingerprint. Each reads about as many bytes."""
    loads, others = [0] * exchange.num_processes, []
    for name in wanted:
        process = loads.index(min(loads))
        loads[process] += math.prod(wanted[name].shape) * source.dtype(name).itemsize
        if process != exchange.process_id:
            others.append(name)
    return others


def compare_with_source(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    state: nnx.State,
    *,
    where: str,
    progress: bool = False,
) -> None:
    """Raise a `UserError` unless every parameter equals the source's weights, bit by bit.

    Args:
        config: the decoder.
        family: whose names the source's weights have.
        source: the weights, read once more.
        state: parameters in the dtypes of `stored_dtypes`.
        where: their directory, for the message.
        progress: show a bar on stderr.
    """
    arrays = named_parameters(state)
    for block in read_weights(config, family, source, progress=progress, label="compared"):
        for rows in block.slices:
            array = arrays[rows.parameter]
            layer = array if rows.layer is None else array[rows.layer]
            written = np.asarray(layer[rows.first_row : rows.first_row + len(rows.values)])
            if written.tobytes() != rows.values.astype(array.dtype).tobytes():
                raise UserError(
                    f"{where}: {block.name} did not come back as it was written; the disk or the memory "
                    "is at fault: try again elsewhere"
                )


def _check_tied_head(family: Family, source: WeightSource, embedding_VD: jax.Array) -> None:
    """Raise a `UserError` if the files hold a head that differs from the embedding it is tied to.

    Of an embedding on a mesh that spans processes, each compares the rows of its own devices.
    """
    head, embedding = family.keys["lm_head.weight"].name, family.keys["embedding"].name
    if head not in source.shapes():
        return
    shards = embedding_VD.addressable_shards
    rows_of = {shard.index[0].indices(len(embedding_VD))[:2]: shard for shard in shards}
    for (low, high), shard in sorted(rows_of.items(), key=lambda item: item[0]):
        shape = (high - low, *embedding_VD.shape[1:])
        for begin, end in row_blocks(shape, source.dtype(head).itemsize):
            rows = np.asarray(shard.data[begin:end])
            part = (slice(low + begin, low + end), slice(0, shape[1]))
            if not np.array_equal(source.read_part(head, part).astype(rows.dtype), rows):
                raise UserError(
                    f"{source.where}: {head} differs from {embedding}, to which the config ties it "
                    "(tie_word_embeddings); correct the config, or remove the weight that is not meant"
                )


# Donated, so that the shard is updated in place, not copied.
_update = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


class _Parameter:
    """A parameter that is being written: one shard per device of this process, zeros at first.

    Args:
        shape: of the whole parameter.
        dtype: of its values.
        sharding: None for the default device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> None:
        self._shape, self._sharding = shape, sharding
        if sharding is None:
            whole = jnp.zeros(shape, dtype)
            self._shards = [(tuple((0, size) for size in shape), whole)]
            return
        self._shards = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            bounds = tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))
            sizes = tuple(end - begin for begin, end in bounds)
            with jax.default_device(device):  # else it is made on the first device and then moved
                shard = jax.device_put(jnp.zeros(sizes, dtype), device)
            self._shards.append((bounds, shard))

    def write(self, rows: ParameterSlice) -> None:
        """Copy the rows to the shards, in blocks."""
        layer = () if rows.layer is None else (rows.layer,)
        dtype = self._shards[0][1].dtype
        for begin, end in row_blocks(rows.values.shape, dtype.itemsize):
            block = rows.values[begin:end].astype(dtype)
            block = block.reshape(*[1] * len(layer), *block.shape)
            start = (*layer, rows.first_row + begin, rows.first_column)[: block.ndim]
            self._shards = [
                (bounds, _written(shard, bounds, block, start)) for bounds, shard in self._shards
            ]
            # Without waiting, blocks would queue up in memory.
            jax.block_until_ready([shard for _, shard in self._shards])

    def parts(self, has_layers: bool) -> list[Part]:
        """What this process's shards hold of the parameter, or of each of its layers."""
        bounds = {tuple(found[1:] if has_layers else found) for found, _ in self._shards}
        return [tuple(slice(*bound) for bound in found) for found in sorted(bounds)]

    def array(self) -> jax.Array:
        """The shards as one array."""
        shards = [shard for _, shard in self._shards]
        if self._sharding is None:
            return shards[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _written(
    shard: jax.Array, bounds: tuple[tuple[int, int], ...], block: np.ndarray, start: tuple[int, ...]
) -> jax.Array:
    """The shard with the part of the block that is in it.

    Args:
        shard: part of a parameter.
        bounds: its (first, end) along each axis of the parameter.
        block: values of the parameter.
        start: their first index along each axis.
    """
    cuts, offsets = [], []
    for (low, high), offset, size in zip(bounds, start, block.shape, strict=True):
        begin, end = max(low, offset), min(high, offset + size)
        if begin >= end:
            return shard
        cuts.append(slice(begin - offset, end - offset))
        offsets.append(begin - low)
    return _update(shard, block[tuple(cuts)], np.asarray(offsets, np.int32))
