"""What a run will need, in bytes, before anything is compiled or loaded; and what memory is free.

The prediction is made from the sizes of the model and of the largest batch alone. Its counts of arrays
were fitted to XLA's own account (`Programs.memory`) on the CPU, where a test holds it within 20 % for
float32 and float64, from tiny models to two layers of Llama-3.1-8B; `benchmarks/memory` shows the three
numbers (predicted, XLA's, measured) side by side. Dimensions are those of the package's docstring.
"""

import math
import os
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxgrad.data.batches import BatchShape
from jaxgrad.dtypes import DTYPES, at_least_float32
from jaxgrad.gradients.loss import CHUNK
from jaxgrad.measure.reduction import shared_inputs
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.models.device_sizes import kept_numbers, projection_sizes, sizes_on
from jaxgrad.models.sharding import ONE_DEVICE, MeshShape
from jaxgrad.options import MeasureSettings
from jaxgrad.spectra import choose_algorithm
from jaxgrad.spectra.similarity import TILE_ROWS

# Padded tokens of a batch. On a CPU short examples share the reading of the weights; from 512 tokens on
# more rows gain nothing (docs/ledger.md).
DEFAULT_BATCH_TOKENS = {"cpu": 512, "gpu": 8192, "tpu": 8192}
# Where the weights are split: arrays of the stream's size that are sums over devices, of one layer.
SUM_ARRAYS = 4
# Arrays of the stream's size that a layer keeps in float32.
WIDE_STREAM_ARRAYS = 4
# Arrays of the scores' size, T x T a head, of the one layer that is differentiated.
SCORE_ARRAYS = 3.0
# Arrays [B, positions, V] of the loss; positions are at most a chunk of them (`gradients.loss.CHUNK`).
LOGIT_ARRAYS = 2
# Of what is at hand, a batch is made to fit in this part.
USABLE = 0.9


@dataclass(frozen=True)
class MemoryPrediction:
    """What the program for one batch shape needs on its device, on a mesh on each of them, in bytes.

    Attributes:
        shape: the batch.
        weights: all parameters.
        factors: X and D of all layers, X once for the projections that share it.
        residuals: what the forward pass keeps for the backward pass, all layers.
        layer: work of the one layer in the backward pass: its weights as a copy, its attention scores.
        head: logits, and what the loss makes of them.
        reduction: from factors to numbers: copies, Gram matrices and built gradients.
        mesh: where it runs.
    """

    shape: BatchShape
    weights: int
    factors: int
    residuals: int
    layer: int
    head: int
    reduction: int
    mesh: MeshShape = ONE_DEVICE

    @property
    def work_space(self) -> int:
        """All but the weights, at the worst moment: the loss, the backward pass or the reduction."""
        kept = self.residuals + self.factors
        return max(kept + self.layer, kept + self.head, self.factors + self.reduction)

    @property
    def total(self) -> int:
        """Weights, and the work space of the batches that are in flight at once."""
        return self.weights + batches_in_flight(self.mesh) * self.work_space


@dataclass(frozen=True)
class BatchChoice:
    """The tokens of a batch that were chosen, and why.

    Attributes:
        batch_tokens: the choice.
        default: what would have been taken with memory enough.
        needed: bytes of the largest batch, weights included.
        at_hand: bytes; None where the machine does not say.
    """

    batch_tokens: int
    default: int
    needed: int
    at_hand: int | None

    @property
    def fits(self) -> bool:
        """Whether the largest batch is within what is at hand."""
        return self.at_hand is None or self.needed <= self.at_hand

    @property
    def shortage(self) -> str:
        """What the largest batch needs and what is there, in words."""
        return f"about {bytes_text(self.needed)} and {bytes_text(self.at_hand or 0)} are at hand"


def bytes_text(num_bytes: int) -> str:
    """A size for people: "1.42 GB", "0.30 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 5e6 else f"{num_bytes / 1e6:.2f} MB"


def default_batch_tokens() -> int:
    """Padded tokens of a batch on one device of this process's backend."""
    return DEFAULT_BATCH_TOKENS[jax.default_backend()]


def batches_in_flight(mesh: MeshShape = ONE_DEVICE) -> int:
    """How many batches are computed at once: two on one device of a CPU of several cores, one elsewhere.

    LAPACK runs on one thread (see `measure.blas`): with two batches the other core has work meanwhile. On a
    mesh two programs could each hold threads that the other's collectives wait for.
    """
    if mesh != ONE_DEVICE:
        return 1
    return min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def weight_bytes(config: DecoderConfig, dtype: str, mesh: MeshShape = ONE_DEVICE) -> int:
    """All parameters that a device holds, exactly."""
    return sizes_on(config, mesh).parameters * np.dtype(DTYPES[dtype]).itemsize


def predict_memory(
    config: DecoderConfig,
    dtype: str,
    settings: MeasureSettings,
    shape: BatchShape,
    *,
    mesh: MeshShape = ONE_DEVICE,
) -> MemoryPrediction:
    """What measuring one batch needs, on a mesh on each of its devices.

    Args:
        config: the model.
        dtype: of weights and arithmetic.
        settings: what is measured.
        shape: B, T and S.
        mesh: the devices need not be there.
    """
    backend = settings.backend
    B, T, S = mesh.rows(shape.num_examples), shape.num_tokens, shape.num_responses
    L, D = config.num_layers, config.width
    size = np.dtype(DTYPES[dtype]).itemsize
    wide = np.dtype(at_least_float32(DTYPES[dtype])).itemsize
    # A CPU has no bfloat16 products: XLA computes in float32, on a float32 copy of all weights.
    emulated = backend == "cpu" and size < wide
    active = wide if emulated else size
    own = sizes_on(config, mesh)

    residuals = B * L * T * kept_numbers(config, mesh) * active
    # Norms are float32 whatever the dtype, and what they keep of the stream is, too.
    residuals += B * L * T * WIDE_STREAM_ARRAYS * D * (wide - active)
    scores = SCORE_ARRAYS * B * own.heads * T * T * wide
    copy = (own.parameters if emulated else own.layer_parameters) * active

    sizes, names = own.projections, settings.selection.names
    rows = {name: (T * L if PROJECTIONS[name].stacked else S) for name in names}
    inputs = {PROJECTIONS[name].input: rows[name] * sizes[name][1] for name in names}
    factors = B * (sum(inputs.values()) + sum(rows[n] * sizes[n][0] for n in names)) * active
    if settings.layerwise:
        # What each layer takes, and the rest of one layer.
        residuals = residuals // L + B * L * T * D * active
        factors = B * _layerwise_factors(sizes, settings, shape) * active
    head = LOGIT_ARRAYS * B * (S if "lm_head" in names else min(S, CHUNK))
    head *= own.vocabulary * wide
    if settings.method == "dense":
        # The weights' own gradients of all layers exist beside the factors, for every example.
        stacked = {name: L if PROJECTIONS[name].stacked else 1 for name in names}
        factors += B * sum(stacked[n] * math.prod(sizes[n]) for n in names) * active
    reduction = _reduction(config, settings, shape, backend, size, mesh) + copy * emulated
    if mesh.model > 1:
        reduction += _moved(config, settings, shape, mesh) * active
        scores += SUM_ARRAYS * B * T * D * active
    return MemoryPrediction(
        shape=shape,
        weights=own.parameters * size,
        factors=factors,
        residuals=residuals,
        layer=int(scores + copy),
        head=head,
        reduction=int(reduction),
        mesh=mesh,
    )


def _layerwise_factors(
    sizes: dict[str, tuple[int, int]], settings: MeasureSettings, shape: BatchShape
) -> int:
    """Numbers in an example's factors of one layer. lm_head's are never held together with a layer's."""
    names = settings.selection.names
    T, S = shape.num_tokens, shape.num_responses
    inputs = {PROJECTIONS[name].input: sizes[name][1] for name in names if name != "lm_head"}
    layer = T * (sum(inputs.values()) + sum(sizes[n][0] for n in names if n != "lm_head"))
    return max(layer, S * sum(sizes["lm_head"]) if "lm_head" in names else 0)


def _moved(
    config: DecoderConfig, settings: MeasureSettings, shape: BatchShape, mesh: MeshShape
) -> int:
    """Numbers in the factors (or matrices) that a device of a mesh has of its own layers, whole."""
    sizes, total = projection_sizes(config), 0
    for names in shared_inputs(settings.selection):
        rows = shape.num_tokens if PROJECTIONS[names[0]].stacked else shape.num_responses
        layers = -(-len(settings.selection[names[0]]) // mesh.model)
        layers += config.num_layers * settings.similarity
        numbers = rows * (sizes[names[0]][1] + sum(sizes[name][0] for name in names))
        if settings.method == "dense":
            numbers += sum(math.prod(sizes[name]) for name in names)
        total += layers * numbers
    return mesh.rows(shape.num_examples) * total


def _reduction(
    config: DecoderConfig,
    settings: MeasureSettings,
    shape: BatchShape,
    backend: str,
    size: int,
    mesh: MeshShape,
) -> int:
    """Work of the reduction: a layer at a time on a CPU, all layers of a projection elsewhere."""
    B, T = mesh.rows(shape.num_examples), shape.num_tokens
    sizes, selection = projection_sizes(config), settings.selection
    wide = max(size, 4)
    most = together = 0
    for name in selection.names:
        num_out, num_in = sizes[name]
        rows = T if PROJECTIONS[name].stacked else shape.num_responses
        layers = -(-len(selection[name]) // mesh.model)
        at_once = 1 if backend == "cpu" or settings.layerwise else layers
        short, matrix = min(num_out, num_in), num_out * num_in
        algorithm = choose_algorithm(
            rows, num_out, num_in, backend=backend, method=settings.method, is_float64=size == 8
        )
        work = {
            "qr": (2 * rows * (num_out + num_in) + 3 * rows * rows) * wide,
            "gram": (rows * (num_out + num_in) + 4 * rows * rows) * 8,
            "build": 3 * matrix * wide,
            "jacobi": (3 * rows * (num_out + num_in) + 8 * min(rows, max(num_out, num_in)) ** 2)
            * 4,
            "build_gram": (rows * (num_out + num_in) + 2 * matrix + 3 * short * short) * 8,
        }["build" if settings.method == "dense" else algorithm]
        # By "jacobi" all projections are reduced at once.
        together += B * at_once * work if algorithm == "jacobi" else 0
        most = max(most, B * at_once * work, together)
    if settings.similarity:
        # D scaled and cut into tiles of rows, and the rows of every layer's gradient in one tile.
        for name in selection.names:
            num_out, num_in = sizes[name]
            layers = len(selection[name])
            tile = min(TILE_ROWS, num_out) * num_in
            most = max(most, B * layers * (3 * T * num_out + tile) * wide)
    return most


def resident_bytes() -> int:
    """The peak memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_at_hand() -> int | None:
    """Bytes for weights and work space: a device's limit, or what this machine has available.

    None where neither is told. On a CPU what this process holds already is not in it, and the devices of
    a mesh share it.
    """
    if jax.default_backend() == "cpu":
        return _machine_memory()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _machine_memory(root: Path = Path("/")) -> int | None:
    """Available memory of the machine or of the control group, whichever is less.

    Args:
        root: where /proc and /sys stand (another one in tests).
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()  # "max" where there is none
        if limit.isdigit():
            used = int((group / "memory.current").read_text())
            # Cached files count as used, but are given back.
            for line in (group / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError, IndexError):
        pass
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def choose_batch_tokens(
    config: DecoderConfig,
    dtype: str,
    settings: MeasureSettings,
    sizes: Iterable[tuple[int, int]],
    *,
    default: int,
    at_hand: int | None,
    fixed: bool = False,
    mesh: MeshShape = ONE_DEVICE,
) -> BatchChoice:
    """The default, halved until every batch fits in 90 % of the memory at hand, or is one example.

    Args:
        config: the model.
        dtype: of weights and arithmetic.
        settings: what is measured.
        sizes: padded (T, S) of the examples.
        default: tokens of a batch with memory enough.
        at_hand: of a device, from `memory_at_hand`; None takes the default.
        fixed: take the default, and only say what it needs.
        mesh: where the batches run; an example for each device of "data" is the least.
    """
    sizes = set(sizes)

    def needed(batch_tokens: int) -> int:
        shapes = [BatchShape(max(1, batch_tokens // T), T, S) for T, S in sizes]
        found = (predict_memory(config, dtype, settings, shape, mesh=mesh) for shape in shapes)
        return max((one.total for one in found), default=weight_bytes(config, dtype, mesh))

    tokens, smallest = default, min((T for T, _ in sizes), default=1) * mesh.data
    need = needed(tokens)
    while not fixed and at_hand is not None and need > USABLE * at_hand and tokens >= 2 * smallest:
        tokens //= 2
        need = needed(tokens)
    return BatchChoice(tokens, default, need, at_hand)


def largest_shape(
    config: DecoderConfig,
    dtype: str,
    settings: MeasureSettings,
    shapes: Iterable[BatchShape],
    mesh: MeshShape = ONE_DEVICE,
) -> MemoryPrediction:
    """The prediction for the shape that needs most; of equal ones the largest."""
    predictions = (predict_memory(config, dtype, settings, shape, mesh=mesh) for shape in shapes)
    return max(predictions, key=lambda prediction: (prediction.total, prediction.shape))
