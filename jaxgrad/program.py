"""The compiled programs of a run: one for each batch shape, made once, counted and timed.

XLA compiles for fixed shapes, and a compilation that nobody sees is the commonest way to lose time. So
programs are compiled ahead of time, by name, and a run prints how many there were.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg  # noqa: F401 - jaxlib loads it at its first LAPACK call, too late to be limited
from flax import nnx
from threadpoolctl import ThreadpoolController

from jaxgrad.batches import BatchArrays, BatchShape
from jaxgrad.dtypes import DTYPES
from jaxgrad.gradients import ExampleArrays, Selection, to_example_arrays
from jaxgrad.measure import MeasureSettings, measure_batch
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.spectra import Statistics


@dataclass(frozen=True)
class MemoryPlan:
    """What one program needs on its device, in bytes, from XLA's own account."""

    weights: int
    work_space: int
    shape: BatchShape

    @property
    def total(self) -> int:
        """Weights and work space together."""
        return self.weights + self.work_space


class CompileTally(NamedTuple):
    """Compilations: how many shapes, and the seconds that they took."""

    shapes: int
    seconds: float


_blas_lock = threading.Lock()
_blas_users: list[Any] = []


@contextlib.contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """While any thread is inside, OpenBLAS runs on the thread that calls it.

    jaxlib takes LAPACK from SciPy's OpenBLAS, whose own threads wait by spinning and fight with XLA's
    for the cores (T = 256 on two busy cores: 20 s an example instead of 3). The limit is the process's,
    so the last one to leave lifts it.
    """
    with _blas_lock:
        limit = None if _blas_users else ThreadpoolController().limit(limits=1, user_api="blas")
        _blas_users.append(limit or _blas_users[0])
    try:
        yield
    finally:
        with _blas_lock:
            limit = _blas_users.pop()
            if not _blas_users:
                limit.restore_original_limits()


class Programs:
    """`measure_batch` compiled for each batch shape of a run.

    float64 is switched on around every trace and call: singular values are reduced to statistics in
    float64 whatever the model's dtype, and the switch must not leak into the caller's own JAX code.
    """

    def __init__(self, config: DecoderConfig, dtype: str, settings: MeasureSettings) -> None:
        self._settings = settings
        with jax.enable_x64(True):
            self._graphdef, self._state = abstract_decoder(config, DTYPES[dtype])
        self._compiled: dict[BatchShape, Callable[..., Any]] = {}
        self._compile_lock = threading.Lock()
        self._compile_seconds = 0.0

    @property
    def selection(self) -> Selection:
        """Which weights the programs measure."""
        return self._settings.selection

    @property
    def tally(self) -> CompileTally:
        """What was compiled so far."""
        return CompileTally(len(self._compiled), self._compile_seconds)

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
        B, T, S = shape.num_examples, shape.num_tokens, shape.num_responses
        shapes: list[Any] = [  # in the order of ExampleArrays
            jax.ShapeDtypeStruct((B, T), np.int32),
            jax.ShapeDtypeStruct((B, S), np.int32),
            jax.ShapeDtypeStruct((B, S), np.int32),
            jax.ShapeDtypeStruct((B, S), np.float64),
        ]
        batch = ExampleArrays(*shapes)
        with jax.enable_x64(True):
            lowered = measure_batch.lower(self._graphdef, self._state, batch, self._settings)
            program = lowered.compile()
        self._compile_seconds += time.perf_counter() - started
        self._compiled[shape] = program

    def memory(self, shape: BatchShape) -> MemoryPlan:
        """What the program for `shape` needs; compiles it."""
        stats = self.compiled(shape).memory_analysis()
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._state))
        if stats is None:  # a backend without the account
            return MemoryPlan(weights, 0, shape)
        return MemoryPlan(weights, stats.temp_size_in_bytes + stats.output_size_in_bytes, shape)

    def measure(
        self, state: nnx.State, shape: BatchShape, arrays: BatchArrays
    ) -> tuple[np.ndarray, dict[str, Statistics]]:
        """Losses [B] and statistics [B, L, ...] of one batch, as NumPy arrays; from any thread."""
        program = self.compiled(shape)
        with jax.enable_x64(True), _single_threaded_blas():
            batch = to_example_arrays(
                arrays.tokens_BT, arrays.positions_BS, arrays.labels_BS, arrays.weights_BS
            )
            return jax.device_get(program(state, batch))
