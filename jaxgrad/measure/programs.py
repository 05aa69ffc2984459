"""The compiled programs of a run: one for each batch shape, made once, counted and timed.

XLA compiles for fixed shapes. Compilations that nobody sees are the commonest way to lose time. So programs
are compiled ahead of time, one a shape, and a run prints how many there were.

A batch whose program needs more than an accelerator's memory by XLA's account, or that runs out of it, is
measured in two halves, and so are all later batches of its shape.

On a mesh that spans processes all of them run the same programs in the same order, and each gets all
results. There a batch is halved only where it does not compile, which all find alike.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.dtypes import DTYPES
from jaxgrad.errors import UserError
from jaxgrad.gradients.selection import Selection
from jaxgrad.measure.blas import single_threaded_blas
from jaxgrad.measure.memory import batches_in_flight, memory_at_hand
from jaxgrad.measure.on_mesh import measure_batch_on
from jaxgrad.measure.one_device import measure_batch
from jaxgrad.measure.reduction import Measured
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import abstract_decoder, named_parameters, with_parameters
from jaxgrad.models.sharding import (
    DATA,
    ONE_DEVICE,
    MeshShape,
    bytes_on_a_device,
    parameter_shardings,
    shape_of,
    spans_processes,
)
from jaxgrad.options import Backend, MeasureSettings


@dataclass(frozen=True)
class CompiledMemory:
    """What one program needs on its device (on a mesh: on each), in bytes, from XLA's own account."""

    weights: int
    work_space: int
    shape: BatchShape
    mesh: MeshShape = ONE_DEVICE

    @property
    def total(self) -> int:
        """Weights, and the work space of the batches that are in flight at once."""
        return self.weights + batches_in_flight(self.mesh) * self.work_space


class CompileTally(NamedTuple):
    """Compilations: how many shapes, and the seconds that they took."""

    shapes: int
    seconds: float


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Programs:
    """`measure_batch` compiled for each batch shape of a run, for one device or for a mesh.

    float64 is switched on around every trace and call, and nowhere else: singular values are reduced in
    float64 whatever the model's dtype, and the caller's own JAX code must not notice.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: str,
        settings: MeasureSettings,
        mesh: Mesh | None = None,
    ) -> None:
        self._settings, self._mesh = settings, mesh
        with jax.enable_x64(True):
            self._graphdef, self._state = abstract_decoder(config, DTYPES[dtype])
            if mesh is not None:
                self._state = _placed(self._state, config, mesh)
        self._compiled: dict[BatchShape, Callable[..., Any]] = {}
        self._compile_lock = threading.Lock()
        self._compile_seconds = 0.0
        self._num_compiled = 0
        self._halves: dict[BatchShape, BatchShape] = {}

    @property
    def selection(self) -> Selection:
        """Which weights the programs measure."""
        return self._settings.selection

    @property
    def mesh_shape(self) -> MeshShape:
        """Of the mesh that they run on."""
        return shape_of(self._mesh)

    @property
    def spans(self) -> bool:
        """Whether that mesh has devices of other processes, which then run the same programs."""
        return spans_processes(self._mesh)

    @property
    def tally(self) -> CompileTally:
        """What was compiled so far."""
        return CompileTally(self._num_compiled, self._compile_seconds)

    @property
    def halves(self) -> dict[BatchShape, BatchShape]:
        """Shapes that were too large for the memory -> the shape of the parts they are measured in."""
        return dict(self._halves)

    def tally_since(self, before: CompileTally) -> CompileTally:
        """What was compiled since an earlier `tally`."""
        now = self.tally
        return CompileTally(now.shapes - before.shapes, now.seconds - before.seconds)

    def compiled(self, shape: BatchShape) -> Any:
        """The program for a batch shape, compiled at its first use, from any thread."""
        if shape not in self._compiled:
            with self._compile_lock:
                if shape not in self._compiled:
                    self._compile(shape)
        return self._compiled[shape]

    def _compile(self, shape: BatchShape) -> None:
        started = time.perf_counter()
        program = compile_lowered(self.lowered(shape), self._settings.backend)
        self._compile_seconds += time.perf_counter() - started
        self._num_compiled += 1
        self._compiled[shape] = program

    def lowered(self, shape: BatchShape, device: Any = None) -> Any:
        """The program for a batch shape as XLA gets it, from `jax.jit`'s `lower`.

        Args:
            shape: of the batch.
            device: for a program without a mesh, the device that it is compiled for, or its description
                (`jax.experimental.topologies`); None for this process's first.
        """
        T, S = shape.num_tokens, shape.num_responses
        B, where = self._padded(shape), self._batch_sharding
        shapes: list[Any] = [  # in the order of `ExampleArrays`
            jax.ShapeDtypeStruct((B, T), np.int32, sharding=where),
            jax.ShapeDtypeStruct((B, S), np.int32, sharding=where),
            jax.ShapeDtypeStruct((B, S), np.int32, sharding=where),
            jax.ShapeDtypeStruct((B, S), np.float64, sharding=where),
        ]
        arguments: Any = (self._state, ExampleArrays(*shapes))
        if device is not None:
            arguments = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device)
                ),
                arguments,
            )
        asked = (self._graphdef, *arguments, self._settings)
        with jax.enable_x64(True):
            if self._mesh is None:
                return measure_batch.lower(*asked)
            if not self.spans:
                return measure_batch_on.lower(*asked, self._mesh)
            whole = _whole_everywhere(self._graphdef, self._settings, self._mesh)
            return whole.lower(*arguments)

    @property
    def _batch_sharding(self) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(DATA))

    def _padded(self, shape: BatchShape) -> int:
        """Rows of the program: every device of "data" has as many."""
        return self.mesh_shape.rows(shape.num_examples) * self.mesh_shape.data

    def memory(self, shape: BatchShape) -> CompiledMemory:
        """What the program for `shape` needs; compiles it, or the largest part of it that fits.

        Raises:
            UserError: not even one example compiles within the device's memory.
        """
        while True:
            if shape in self._halves:
                shape = self._halves[shape]
                continue
            try:
                account = self._account(shape)
                if account.total <= self._limit():
                    return account
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(shape)

    def _account(self, shape: BatchShape) -> CompiledMemory:
        stats = self.compiled(shape).memory_analysis()
        weights = sum(bytes_on_a_device(leaf) for leaf in jax.tree.leaves(self._state))
        # A backend without the account has no work space to tell.
        work = stats.temp_size_in_bytes + stats.output_size_in_bytes if stats is not None else 0
        return CompiledMemory(weights, work, shape, self.mesh_shape)

    def _limit(self) -> float:
        """Bytes that a program may need: an accelerator's memory. A CPU's swap may help, so it has none."""
        at_hand = None if self._settings.backend == "cpu" else memory_at_hand()
        return math.inf if at_hand is None else at_hand

    def measure(
        self, state: nnx.State, shape: BatchShape, arrays: ExampleArrays
    ) -> tuple[np.ndarray, Measured]:
        """Losses and columns of one batch, as NumPy arrays with B rows; from any thread.

        Where the memory is too small the batch is measured in halves, which changes nothing but the
        time; rows of padding behind the last example may then be left out.

        Raises:
            UserError: the memory is too small for one example.
        """
        if shape not in self._halves and not self.spans and self._limit() < math.inf:
            self.memory(shape)  # halved before it runs, where XLA's account is beyond the memory
        if shape not in self._halves:
            try:
                return self._measure_whole(state, shape, arrays)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.spans:  # the others run this program to its end, and may have memory for it
                    raise self._too_large(shape) from error
            # Outside the handler, whose traceback keeps the arrays of the failed call alive.
            self._halve(shape)
        half = self._halves[shape]
        parts = [self.measure(state, half, part) for part in _parts(arrays, half.num_examples)]
        return jax.tree.map(
            lambda *rows: np.concatenate(rows)[: shape.num_examples], parts[0], *parts[1:]
        )

    def _measure_whole(
        self, state: nnx.State, shape: BatchShape, arrays: ExampleArrays
    ) -> tuple[np.ndarray, Measured]:
        program = self.compiled(shape)
        if self._mesh is not None:
            (arrays,) = _parts(arrays, self._padded(shape))
        with jax.enable_x64(True), single_threaded_blas():
            batch = self._placed_batch(arrays)
            if self._mesh is None:
                return jax.device_get(program(state, batch))
            loss_B, found = jax.device_get(program(state, batch))
        return self._cut(loss_B, found, shape.num_examples)

    def _placed_batch(self, arrays: ExampleArrays) -> Any:
        where = self._batch_sharding
        if where is None or not self.spans:
            return jax.device_put(arrays, where)
        # `device_put` would have the processes compare their arrays, a collective of its own.
        parts = [jax.make_array_from_callback(a.shape, where, a.__getitem__) for a in arrays]
        return ExampleArrays(*parts)

    def _cut(
        self, loss_B: np.ndarray, found: Measured, num_examples: int
    ) -> tuple[np.ndarray, Measured]:
        """Without the rows and layers of zeros that filled the mesh."""
        rows = slice(num_examples)
        return loss_B[rows], {
            name: jax.tree.map(
                lambda array_BL, count=len(self.selection[name]): array_BL[rows, :count], values
            )
            for name, values in found.items()
        }

    def _too_large(self, shape: BatchShape) -> UserError:
        tokens, kind = max(1, shape.num_examples // 2) * shape.num_tokens, _device_kind()
        return UserError(
            f"the memory of {kind} ran out in a batch of {shape.num_examples} "
            f"x {shape.num_tokens} tokens on mesh {self.mesh_shape}, which spans the processes, so that it "
            f"is not halved; give --batch_tokens={tokens} and another --output_dir"
        )

    def _halve(self, shape: BatchShape) -> None:
        rows = self.mesh_shape.rows(shape.num_examples)  # of one device: fewer of them need less
        if rows == 1:
            raise UserError(
                f"the memory of {_device_kind()} is too small for one example of "
                f"{shape.num_tokens} tokens; give a smaller --max_length, --dtype=bfloat16, fewer "
                "--parameters, or no --similarity"
            )
        self._compiled.pop(shape, None)  # its code takes memory, too
        half = (rows + 1) // 2 * self.mesh_shape.data
        self._halves[shape] = BatchShape(half, shape.num_tokens, shape.num_responses)


def _device_kind() -> str:
    return jax.local_devices()[0].device_kind


def compile_lowered(lowered: Any, backend: Backend) -> Any:
    """The program compiled, for a TPU at XLA's level O1.

    Its usual level takes three to four times as long to compile the reduction: minutes for each shape.
    """
    level = jax.config.values["jax_optimization_level"]
    if backend == "tpu" and level == "UNKNOWN":  # the caller has set none
        jax.config.update("jax_optimization_level", "O1")
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_optimization_level", level)


def _whole_everywhere(graphdef: nnx.GraphDef, settings: MeasureSettings, mesh: Mesh) -> Any:
    """`measure_batch_on` with its results on every device, so that each process has all of them."""

    def run(state: nnx.State, batch: ExampleArrays) -> tuple[jax.Array, Measured]:
        return measure_batch_on(graphdef, state, batch, settings, mesh)

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _placed(state: nnx.State, config: DecoderConfig, mesh: Mesh) -> nnx.State:
    """The shapes of a decoder's weights, with where they lie."""
    shapes = named_parameters(state)
    shardings = parameter_shardings(config, shapes, mesh)
    placed: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name])
        for name, value in shapes.items()
    }
    return with_parameters(state, placed)


def _parts(arrays: ExampleArrays, num_rows: int) -> list[ExampleArrays]:
    """The batch cut into batches of `num_rows`, the last one padded; none of padding alone."""
    parts: list[ExampleArrays] = []
    for begin in range(0, len(arrays.tokens_T), num_rows):
        rows = [array[begin : begin + num_rows] for array in arrays]
        missing = num_rows - len(rows[0])
        part = ExampleArrays(*(np.pad(array, ((0, missing), (0, 0))) for array in rows))
        if not parts or part.weights_S.any():
            parts.append(part)
    return parts
