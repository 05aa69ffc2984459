"""Meshes of devices: the axis "data" splits examples, the axis "model" splits weights.

A mesh has devices of this process only, or, where it is larger, of all processes that JAX's distributed
runtime has joined, equally many of each: it spans them.

`RULES` says which axis of which parameter is split. A parameter that does not divide by the devices of
"model" is replicated on them. Rules go by name and shape; nothing here holds an array.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig

DATA, MODEL = "data", "model"

# What the axes count that may be split.
SplitAxis = Literal["heads", "kv_heads", "mlp", "vocabulary"]

# Parameter -> what each of its axes counts, None for those that are never split. Split are the outputs of
# q, k, v, gate and up, and the inputs of o and down: two all-reduces per layer and pass, one after
# attention and one after the MLP.
RULES: dict[str, tuple[SplitAxis | None, ...]] = {
    "embedding": ("vocabulary", None),
    "position_embedding": (None, None),
    "layers.attention.q.weight": (None, "heads", None),
    "layers.attention.q.bias": (None, "heads"),
    "layers.attention.k.weight": (None, "kv_heads", None),
    "layers.attention.k.bias": (None, "kv_heads"),
    "layers.attention.v.weight": (None, "kv_heads", None),
    "layers.attention.v.bias": (None, "kv_heads"),
    "layers.attention.o.weight": (None, None, "heads"),
    "layers.attention.o.bias": (None, None),
    # For norms over all heads together; norms of single heads are replicated (`QK_NORM`).
    "layers.attention.q_norm.weight": (None, "heads"),
    "layers.attention.q_norm.bias": (None, "heads"),
    "layers.attention.k_norm.weight": (None, "kv_heads"),
    "layers.attention.k_norm.bias": (None, "kv_heads"),
    "layers.mlp.gate.weight": (None, "mlp", None),
    "layers.mlp.gate.bias": (None, "mlp"),
    "layers.mlp.up.weight": (None, "mlp", None),
    "layers.mlp.up.bias": (None, "mlp"),
    "layers.mlp.down.weight": (None, None, "mlp"),
    "layers.mlp.down.bias": (None, None),
    **{
        f"layers.{norm}_norm.{name}": (None, None)
        for norm in ("attention", "attention_post", "mlp", "mlp_post")
        for name in ("weight", "bias")
    },
    "final_norm.weight": (None,),
    "final_norm.bias": (None,),
    "lm_head.weight": ("vocabulary", None),
}
QK_NORM = re.compile(r"layers\.attention\.[qk]_norm\.")


class MeshShape(NamedTuple):
    """Devices along "data" and along "model"."""

    data: int = 1
    model: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"{self.data}x{self.model}"

    def rows(self, num_examples: int) -> int:
        """Examples per device of a batch, rounded up: the last devices may get padding."""
        return -(-num_examples // self.data)


ONE_DEVICE = MeshShape()


def parse_mesh(text: str) -> MeshShape | None:
    """The mesh shape that --mesh asks for; None for "auto".

    Raises:
        UserError: it is neither "auto" nor DxM with positive numbers.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    shape = MeshShape(*map(int, found.groups())) if found else None
    if shape is None or not shape.num_devices:
        raise UserError(
            f"--mesh={text} is no mesh; give auto, or DxM with the devices that examples and weights are "
            "split over, such as 4x2"
        )
    return shape


def make_mesh(shape: MeshShape) -> Mesh | None:
    """A mesh of the first D x M devices of this process; None for 1x1, which needs none.

    Where these are too few, and this process is one of several, the mesh spans the processes: it has the
    first devices of each, equally many. All of them have to make it, and to run the same programs on it
    in the same order.

    Raises:
        UserError: there are fewer devices, the processes' shares would not be equal, or the devices of
            a TPU cannot be laid out so.
    """
    local = jax.local_devices()
    if shape == ONE_DEVICE:
        return None
    if shape.num_devices <= len(local):
        choices = {n: local[:n] for n in range(1, len(local) + 1)}
    elif shape.num_devices > max(_num_devices_by_process().values()) and jax.process_count() > 1:
        choices = shares_of_each(shape, jax.devices())
    else:
        raise UserError(
            f"--mesh={shape} takes {shape.num_devices} devices, but this process has {len(local)} "
            f"({local[0].platform}); give a smaller mesh, or auto"
        )
    return mesh_of(shape, choices)


def mesh_of(shape: MeshShape, choices: Mapping[int, Sequence[Any]]) -> Mesh:
    """A mesh of given devices, or of their descriptions; arguments and errors are those of `laid_out`."""
    # Auto axes: the compiler splits the passes by the shardings of parameters and batch.
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(laid_out(shape, choices), (DATA, MODEL), axis_types=auto)


def shares_of_each(shape: MeshShape, devices: Sequence[Any]) -> dict[int, list[Any]]:
    """The devices that a mesh across processes may have, by their number: equally many of each process.

    Args:
        shape: of the mesh that is asked for, larger than what any process has.
        devices: those of all processes.

    Raises:
        UserError: there are fewer, or the shares would not be equal.
    """
    by_process: dict[tuple[int, int], list[Any]] = {}
    for device in sorted(devices, key=lambda device: device.id):
        place = (_slice_of(device), device.process_index)
        by_process.setdefault(place, []).append(device)
    sizes, several = [len(own) for own in by_process.values()], len(by_process)
    choices = {
        share * several: [d for _, own in sorted(by_process.items()) for d in own[:share]]
        for share in range(1, min(sizes) + 1)
        if share * several > max(sizes)
    }
    if shape.num_devices not in choices:
        have = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{min(sizes)}"
        mends = [f"{_listed(choices)} devices"] if choices else []
        raise UserError(
            f"--mesh={shape} takes {shape.num_devices} devices: too many for one of these {several} "
            f"processes, which have {have} each ({devices[0].platform}), and a mesh across processes takes "
            f"equally many of each; give {' or '.join([*mends, 'a mesh that fits one process'])}"
        )
    return choices


def laid_out(shape: MeshShape, choices: Mapping[int, Sequence[Any]]) -> np.ndarray:
    """The devices of a mesh as an array [D, M], so that neighbours in it are neighbours in the machine.

    JAX knows how TPU chips are connected. It takes boxes of chips without holes, so 3, 5 or 7 chips of a
    host are refused. Devices of other kinds, and of several TPU slices, keep their order.

    Args:
        shape: of the mesh.
        choices: the devices that a mesh may have, by their number.

    Raises:
        UserError: they are chips of a TPU and no box.
    """
    devices = choices[shape.num_devices]
    try:
        return _array_of(devices, shape)
    except (AssertionError, ValueError) as error:
        boxes = [n for n, those in choices.items() if _is_box(those)]
        raise UserError(
            f"--mesh={shape}: {shape.num_devices} chips of this TPU are no box, and JAX makes meshes of "
            f"boxes only; give {_listed(boxes)} devices in all"
        ) from error


def _array_of(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    if devices[0].platform != "tpu" or len({_slice_of(device) for device in devices}) > 1:
        return np.asarray(devices, object).reshape(shape)
    # As `jax.make_mesh` does it. Where its way for most TPUs finds nothing, an axis of the chips is split.
    splits = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=splits)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _is_box(devices: Sequence[Any]) -> bool:
    try:
        _array_of(devices, (len(devices), 1))
    except (AssertionError, ValueError):
        return False
    return True


def _slice_of(device: Any) -> int:
    """The group of machines with fast connections that a device is in; 0 where there is but one."""
    return getattr(device, "slice_index", None) or 0


def _listed(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of other processes."""
    return mesh is not None and mesh.is_multi_process


def devices_here(shape: MeshShape) -> int | None:
    """How many devices of this process a mesh takes; None where there are not enough for it."""
    if shape.num_devices <= len(jax.local_devices()):
        return shape.num_devices
    if shape.num_devices <= devices_of_all():
        return -(-shape.num_devices // jax.process_count())
    return None


def devices_of_all() -> int:
    """Devices of the largest mesh across the processes; 0 for a process on its own."""
    counts = _num_devices_by_process()
    return len(counts) * min(counts.values()) if jax.process_count() > 1 else 0


def _num_devices_by_process() -> Counter[int]:
    return Counter(device.process_index for device in jax.devices())


def shape_of(mesh: Mesh | None) -> MeshShape:
    """A mesh's shape; 1x1 for None."""
    return ONE_DEVICE if mesh is None else MeshShape(mesh.shape[DATA], mesh.shape[MODEL])


def divided(config: DecoderConfig, num_model: int) -> dict[SplitAxis, bool]:
    """Whether the size of each splittable axis divides by the devices of "model"."""
    counts: dict[SplitAxis, int] = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.mlp_width,
        "vocabulary": config.vocab_size,
    }
    return {axis: count % num_model == 0 for axis, count in counts.items()}


def check_mesh(config: DecoderConfig, shape: MeshShape) -> None:
    """Raise a `UserError` if no weight of the model divides by the devices of "model"."""
    if not any(divided(config, shape.model).values()):
        raise UserError(
            f"--mesh={shape}: neither the {config.num_heads} attention heads nor the MLP's width "
            f"{config.mlp_width} nor the vocabulary of {config.vocab_size} divides by {shape.model}; "
            "give another number of devices for the weights"
        )


def replicated_line(config: DecoderConfig, shape: MeshShape) -> str | None:
    """A line that names what is replicated because it does not divide; None if all divides."""
    words: dict[SplitAxis, str] = {
        "heads": f"{config.num_heads} attention heads",
        "kv_heads": f"{config.num_kv_heads} kv heads",
        "mlp": f"the MLP's width {config.mlp_width}",
        "vocabulary": f"the vocabulary of {config.vocab_size}",
    }
    whole = [words[axis] for axis, divides in divided(config, shape.model).items() if not divides]
    if not whole:
        return None
    return (
        f"mesh {shape}: not divisible by {shape.model} and whole on each device: {', '.join(whole)}"
    )


def parameter_specs(
    config: DecoderConfig, names: Iterable[str], num_model: int
) -> dict[str, PartitionSpec]:
    """How each parameter is split.

    Args:
        config: the decoder.
        names: its parameters, by the names of `named_parameters`.
        num_model: devices along "model".

    Raises:
        KeyError: `RULES` has no such parameter.
    """
    splits = divided(config, num_model)

    def spec(name: str) -> PartitionSpec:
        rule = RULES[name]
        if num_model == 1 or (config.qk_norm == "head" and QK_NORM.match(name)):
            return PartitionSpec()
        axes = [MODEL if axis is not None and splits[axis] else None for axis in rule]
        return PartitionSpec(*axes) if MODEL in axes else PartitionSpec()

    return {name: spec(name) for name in names}


def parameter_shardings(
    config: DecoderConfig, names: Mapping[str, object], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Each parameter's sharding on a mesh; see `parameter_specs`."""
    specs = parameter_specs(config, names, shape_of(mesh).model)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def scalars_per_device(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], num_model: int
) -> dict[str, int]:
    """Scalars of each parameter that one device holds."""
    specs = parameter_specs(config, shapes, num_model)
    return {
        name: math.prod(shape) // (num_model if MODEL in specs[name] else 1)
        for name, shape in shapes.items()
    }


def bytes_on_a_device(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array, or of one that is planned, on each of its devices."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
