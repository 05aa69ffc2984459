"""The plan of a run: all that is settled before anything is measured.

`plan_run` makes it once, from a model's config and tokenizer, the examples and the options. The dry run
prints it, the session executes it, the benchmarks use it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax

from jaxgrad.checkpoints import Checkpoint, LoadedModel
from jaxgrad.data.batches import (
    Batch,
    BatchShape,
    RowShape,
    choose_row_shapes,
    count_shapes,
    plan_batches,
)
from jaxgrad.data.chat_template import uses_chat
from jaxgrad.data.examples import Example
from jaxgrad.data.tokens import TokenizedExample, tokenize_all
from jaxgrad.errors import UserError
from jaxgrad.gradients.loss import find_loss
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.disk import DiskPrediction, predict_disk
from jaxgrad.measure.memory import (
    USABLE,
    BatchChoice,
    MemoryPrediction,
    choose_batch_tokens,
    default_batch_tokens,
    largest_shape,
    memory_at_hand,
    predict_memory,
    weight_bytes,
)
from jaxgrad.measure.reducers import can_be_layerwise
from jaxgrad.models import DecoderConfig
from jaxgrad.models.sharding import (
    ONE_DEVICE,
    MeshShape,
    check_mesh,
    devices_here,
    devices_of_all,
)
from jaxgrad.options import AnalyzeOptions, Backend, Choice, MeasureSettings

# Consecutive examples that are sorted into batches together and become one part file. More would pad
# less; fewer would show results sooner.
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive examples, and the batches of those that can be measured."""

    tokenized: Sequence[TokenizedExample]
    batches: Sequence[Batch]


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will do and need.

    Attributes:
        model_name: what the user asked for, or the embedded default's name.
        config: of the model.
        options: with max_length, batch_tokens and layerwise settled.
        settings: what is measured of an example.
        mesh: the devices that it runs on; they need not be there yet.
        uses_chat: whether prompts go through the chat template.
        tokenized: all examples.
        windows: the same in windows, with their batches.
        shapes: batch shape -> how many batches have it, in the order of the plan.
        choice: of batch_tokens, by the memory.
        memory: predicted for the shape that needs most; None where nothing can be measured.
        disk: predicted.
    """

    model_name: str
    config: DecoderConfig
    options: AnalyzeOptions
    settings: MeasureSettings
    mesh: MeshShape
    uses_chat: bool
    tokenized: Sequence[TokenizedExample]
    windows: Sequence[Window]
    shapes: Mapping[BatchShape, int]
    choice: BatchChoice
    memory: MemoryPrediction | None
    disk: DiskPrediction

    @property
    def batches(self) -> list[tuple[Window, Batch]]:
        """Every batch with its window, in the order of the plan."""
        return [(window, batch) for window in self.windows for batch in window.batches]

    @property
    def measurable(self) -> list[TokenizedExample]:
        """The examples that can be measured."""
        return [item for item in self.tokenized if item.measurable]

    @property
    def num_matrices(self) -> int:
        """Matrices of one example."""
        return self.settings.selection.num_matrices


def plan_run(
    model: Checkpoint | LoadedModel,
    examples: Sequence[Example],
    options: AnalyzeOptions,
    *,
    mesh: MeshShape | None = ONE_DEVICE,
    loaded: int = 0,
    across: bool = False,
) -> RunPlan:
    """Settles a run: tokens, mesh, batches, memory.

    Args:
        model: opened; its weights are not needed.
        examples: from `read_examples`.
        options: what to measure. A `batch_tokens` or `layerwise` that is given is kept.
        mesh: the mesh to run on; None lets the model's size decide (see `settle_mesh`).
        loaded: bytes that a device holds of the weights already.
        across: whether the model's size may choose a mesh that spans the processes.

    Raises:
        UserError: an option that does not fit the model; or on an accelerator one example needs more
            than its memory.
    """
    config = model.config
    options = options.fitted_to(config.max_positions)
    assert options.max_length is not None
    settings = settings_for(options, config)
    tokenized = tokenize_examples(model, examples, options)
    rows = choose_row_shapes(tokenized, max_length=options.max_length)
    mesh = settle_mesh(mesh, settings, options, config, rows, across=across)
    options, settings, choice = fit_batches(
        options, settings, config, rows, loaded=loaded, mesh=mesh
    )
    windows = _plan_windows(tokenized, options, rows)
    shapes = count_shapes(batch for window in windows for batch in window.batches)
    sizes_on_disk = [
        (item.num_tokens, len(item.example.instruction) + len(item.example.reply_text))
        for item in tokenized
        if item.measurable
    ]
    return RunPlan(
        model_name=model.name,
        config=config,
        options=options,
        settings=settings,
        mesh=mesh,
        uses_chat=uses_chat(model.tokenizer, options.chat),
        tokenized=tokenized,
        windows=windows,
        shapes=shapes,
        choice=choice,
        memory=largest_shape(config, options.dtype, settings, shapes, mesh) if shapes else None,
        disk=predict_disk(
            settings,
            config,
            sizes_on_disk,
            window=WINDOW,
            examples_a_batch=len(sizes_on_disk) / max(1, sum(shapes.values())),
        ),
    )


def settings_for(
    options: AnalyzeOptions, config: DecoderConfig, *, backend: Backend | None = None
) -> MeasureSettings:
    """What is measured of an example of this model.

    Args:
        options: what is asked for.
        config: the model.
        backend: what programs are made for; None for this process's.

    Raises:
        UserError: `parameters` selects none of the model's weights, the loss is unknown, or what is
            asked for needs all layers at once while `layerwise` is "yes", or the device has no float64.
    """
    backend = backend or cast(Backend, jax.default_backend())
    if backend == "tpu" and options.dtype == "float64":
        raise UserError(
            "--dtype=float64: a TPU has no float64 to factorize in; give --dtype=float32, or run on a CPU "
            "or GPU"
        )
    settings = MeasureSettings(
        selection=select_parameters(config, options.parameters),
        loss=find_loss(options.loss).name,
        method=options.method,
        spectrum=options.spectrum,
        extremes=options.extremes,
        similarity=options.similarity,
        layerwise=options.layerwise == "yes",
        precision=options.precision,
        backend=backend,
    )
    if settings.layerwise and not can_be_layerwise(settings):
        raise UserError(
            "--layerwise=yes does not go with --similarity or --method=dense, which need all layers "
            "at once; give one or the other"
        )
    return settings


def tokenize_examples(
    model: Checkpoint | LoadedModel, examples: Sequence[Example], options: AnalyzeOptions
) -> list[TokenizedExample]:
    """The examples as tokens of this model.

    Raises:
        UserError: the tokenizer is not this model's.
    """
    config, tokenizer = model.config, model.tokenizer
    tokenized = tokenize_all(examples, tokenizer, options.protocol_for(tokenizer))
    for item in tokenized:
        # JAX would clamp such an id to the last row of the embedding, in silence.
        if item.num_tokens and item.token_ids.max() >= config.vocab_size:
            cause = (
                "the tokenizer is not this model's; copy the tokenizer's files from where the weights "
                "come from"
                if item.example.given is None
                else "the record was tokenized for another model; give its text instead"
            )
            raise UserError(
                f"record {item.example.index} has token {item.token_ids.max()}, but the model has "
                f"only {config.vocab_size} tokens: {cause}"
            )
    return tokenized


def settle_mesh(
    asked: MeshShape | None,
    settings: MeasureSettings,
    options: AnalyzeOptions,
    config: DecoderConfig,
    rows: Sequence[RowShape],
    *,
    across: bool = False,
) -> MeshShape:
    """The mesh that is asked for; for None ("auto") the one that this model needs on these devices.

    A model that fits on one device with its longest example stays whole. Otherwise its weights are split
    over as few devices as possible: a power of two that divides its heads. The examples are split over
    all other accelerators of this process. Where it does not fit on all of them, but on those of all
    processes, the mesh spans the processes, if it may. On a CPU "auto" is one device: the devices of a
    CPU share its memory and its cores.

    Args:
        asked: the mesh to take; None for "auto".
        settings: what is measured.
        options: the dtype, and whether layers may be reduced one by one.
        config: the model.
        rows: padded sizes of the examples.
        across: whether the mesh may span the processes.

    Raises:
        UserError: no weight divides by the mesh.
    """
    if asked is not None:
        check_mesh(config, asked)
        return asked
    num_devices = len(jax.local_devices())
    in_all = devices_of_all() if across else 0
    if jax.default_backend() == "cpu" or max(num_devices, in_all) == 1:
        return ONE_DEVICE
    at_hand, most = memory_at_hand(), ONE_DEVICE
    for count in (num_devices, in_all):
        num_model = 1
        while num_model <= count and config.num_heads % num_model == 0:
            if count == in_all and count % num_model:
                break  # a mesh across processes takes equally many devices of each
            mesh = MeshShape(count // num_model, num_model)
            needed = _one_example_needs(settings, options, config, set(rows), mesh)
            if at_hand is None or needed <= USABLE * at_hand:
                return mesh
            most, num_model = mesh, 2 * num_model
    return most


def _may_be_layerwise(settings: MeasureSettings, options: AnalyzeOptions, mesh: MeshShape) -> bool:
    """Whether layers may be reduced one by one to save memory."""
    return options.layerwise == "auto" and can_be_layerwise(settings) and mesh.model == 1


def _one_example_needs(
    settings: MeasureSettings,
    options: AnalyzeOptions,
    config: DecoderConfig,
    rows: Iterable[RowShape],
    mesh: MeshShape,
) -> int:
    """Bytes of a device with one example at a time, layers reduced one by one where that may be."""
    if _may_be_layerwise(settings, options, mesh):
        settings = dataclasses.replace(settings, layerwise=True)
    shapes = [BatchShape(mesh.data, T, S) for T, S in rows]
    found = (predict_memory(config, options.dtype, settings, shape, mesh=mesh) for shape in shapes)
    return max((one.total for one in found), default=weight_bytes(config, options.dtype, mesh))


def fit_batches(
    options: AnalyzeOptions,
    settings: MeasureSettings,
    config: DecoderConfig,
    rows: Sequence[RowShape],
    *,
    loaded: int = 0,
    mesh: MeshShape = ONE_DEVICE,
) -> tuple[AnalyzeOptions, MeasureSettings, BatchChoice]:
    """The options and settings with what depends on the memory settled.

    `batch_tokens` is the default, lowered to fit; `layerwise` is "yes" where one example with all layers'
    factors does not fit, and the weights are whole. On a mesh the default is a batch for each device of
    "data". A `batch_tokens` that is given is kept, whatever it needs.

    Args:
        options: what to measure.
        settings: the same for this model.
        config: the model.
        rows: padded sizes of the examples.
        loaded: bytes that a device holds of the weights already.
        mesh: where the run is; its devices need not be there.

    Raises:
        UserError: `layerwise` where the weights are split; or, on an accelerator, one example needs more
            than its memory. (On a CPU swap may help.)
    """
    if settings.layerwise and mesh.model > 1:
        raise UserError(
            f"--layerwise=yes does not go with --mesh={mesh}: the reduction is split over the devices by "
            f"layers, so it has many at once; give --layerwise=no, or --mesh={mesh.num_devices}x1"
        )
    # A dry run's devices need not be there. What they have is then not known.
    here = devices_here(mesh)
    at_hand = memory_at_hand() if here is not None else None
    on_cpu = jax.default_backend() == "cpu"
    if at_hand is not None and on_cpu:
        at_hand = at_hand // (here or 1) + loaded
    given = options.batch_tokens
    default = default_batch_tokens() * mesh.data if given is None else given

    def choose(settings: MeasureSettings) -> BatchChoice:
        return choose_batch_tokens(
            config,
            options.dtype,
            settings,
            rows,
            default=default,
            at_hand=at_hand,
            fixed=given is not None,
            mesh=mesh,
        )

    choice = choose(settings)
    if not choice.fits and _may_be_layerwise(settings, options, mesh):
        settings = dataclasses.replace(settings, layerwise=True)
        choice = choose(settings)
    if not choice.fits and not on_cpu and given is None:
        raise UserError(
            f"one example needs {choice.shortage}; give --dtype=bfloat16, a smaller "
            "--max_length, fewer --parameters, no --similarity, or a --mesh that splits the weights "
            "over more devices"
        )
    layerwise: Choice = "yes" if settings.layerwise else "no"
    options = dataclasses.replace(options, batch_tokens=choice.batch_tokens, layerwise=layerwise)
    return options, settings, choice


def _plan_windows(
    tokenized: Sequence[TokenizedExample], options: AnalyzeOptions, rows: Sequence[RowShape]
) -> list[Window]:
    assert options.batch_tokens is not None and options.max_length is not None
    windows = []
    for begin in range(0, len(tokenized), WINDOW):
        part = tokenized[begin : begin + WINDOW]
        batches = plan_batches(
            part,
            batch_tokens=options.batch_tokens,
            max_length=options.max_length,
            row_shapes=rows,
        )
        windows.append(Window(part, batches))
    return windows
