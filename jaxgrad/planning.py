"""What a run and a dry run both settle before anything is measured: tokens, day, size of batches."""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgrad.batches import BatchShape, choose_row_shapes
from jaxgrad.errors import UserError
from jaxgrad.examples import Example
from jaxgrad.memory import (
    USABLE,
    BatchChoice,
    choose_batch_tokens,
    memory_at_hand,
    predict_memory,
    weight_bytes,
)
from jaxgrad.models import DecoderConfig
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results.layout import load_run
from jaxgrad.run_info import memory_shortage
from jaxgrad.sharding import ONE_DEVICE, MeshShape, check_mesh
from jaxgrad.tokens import TokenizedExample, read_date, tokenize_all


def tokenize_examples(
    tokenizer: Any, config: DecoderConfig, examples: Sequence[Example], options: AnalyzeOptions
) -> list[TokenizedExample]:
    """The examples as tokens of this model.

    Raises:
        UserError: `max_length` exceeds the model's positions, or the tokenizer is not this model's.
    """
    if options.max_length > config.max_positions:
        raise UserError(
            f"--max_length {options.max_length} exceeds the model's {config.max_positions} "
            f"positions; give --max_length={config.max_positions} or less"
        )
    tokenized = tokenize_all(examples, tokenizer, options.protocol_for(tokenizer))
    for item in tokenized:
        # JAX would clamp such an id to the last row of the embedding, in silence.
        if item.num_tokens and item.token_ids.max() >= config.vocab_size:
            raise UserError(
                f"record {item.example.index} has token {item.token_ids.max()}, but the model has "
                f"only {config.vocab_size} tokens: the tokenizer is not this model's; copy the "
                "tokenizer's files from where the weights come from"
            )
    return tokenized


def settle_mesh(
    asked: MeshShape | None,
    options: AnalyzeOptions,
    config: DecoderConfig,
    tokenized: Sequence[TokenizedExample],
) -> MeshShape:
    """The mesh that is asked for; for None ("auto") the one that this model needs on these devices.

    A model that fits on one device with its longest example stays whole; where it does not, its weights
    are split over the fewest devices that do, a power of two that divides its heads. The examples are
    split over all other accelerators of this process. On a CPU "auto" is one device: the devices of a
    CPU share its memory and its cores.

    Raises:
        UserError: no weight divides by the mesh.
    """
    if asked is not None:
        check_mesh(config, asked)
        return asked
    num_devices = len(jax.local_devices())
    if jax.default_backend() == "cpu" or num_devices == 1:
        return ONE_DEVICE
    at_hand = memory_at_hand()
    rows = set(choose_row_shapes(tokenized, max_length=options.max_length))
    mesh, num_model = ONE_DEVICE, 1
    while num_model <= num_devices and config.num_heads % num_model == 0:
        mesh = MeshShape(num_devices // num_model, num_model)
        if at_hand is None or _one_example_needs(options, config, rows, mesh) <= USABLE * at_hand:
            break
        num_model *= 2
    return mesh


def _one_example_needs(
    options: AnalyzeOptions,
    config: DecoderConfig,
    rows: Iterable[tuple[int, int]],
    mesh: MeshShape,
) -> int:
    """Bytes of a device with one example at a time, layers reduced one by one where that may be."""
    settings = options.settings_for(config)
    may_be = options.layerwise == "auto" and settings.can_be_layerwise and mesh.model == 1
    if may_be:
        settings = dataclasses.replace(settings, layerwise=True)
    shapes = [BatchShape(mesh.data, T, S) for T, S in rows]
    found = (predict_memory(config, options.dtype, settings, shape, mesh=mesh) for shape in shapes)
    return max((one.total for one in found), default=weight_bytes(config, options.dtype, mesh))


def fit_batches(
    options: AnalyzeOptions,
    config: DecoderConfig,
    tokenized: Sequence[TokenizedExample],
    *,
    loaded: int = 0,
    mesh: MeshShape = ONE_DEVICE,
) -> tuple[AnalyzeOptions, BatchChoice]:
    """The options with what depends on the memory settled.

    `batch_tokens` is the default, lowered to fit; `layerwise` is "yes" where one example with all layers'
    factors does not fit, and the weights are whole. On a mesh the default is a batch for each device of
    "data".

    Args:
        options: what to measure.
        config: the model.
        tokenized: all examples.
        loaded: bytes of weights that this process holds already, on each device.
        mesh: where the batches run.

    Raises:
        UserError: `layerwise` where the weights are split.
        UserError: not even one example fits on the device. (On a CPU swap may help, so it is not
            raised there.)
    """
    if options.layerwise == "yes" and mesh.model > 1:
        raise UserError(
            f"--layerwise=yes does not go with --mesh={mesh}: the reduction is split over the devices by "
            f"layers, so it has many at once; give --layerwise=no, or --mesh={mesh.num_devices}x1"
        )
    # A dry run's devices need not be there, and what they have is then not known.
    are_here = mesh.num_devices <= len(jax.local_devices())
    at_hand = memory_at_hand() if are_here else None
    on_cpu = jax.default_backend() == "cpu"
    if at_hand is not None and on_cpu:
        at_hand = at_hand // mesh.num_devices + loaded
    rows = choose_row_shapes(tokenized, max_length=options.max_length)

    default = options.tokens_of_a_batch * (1 if options.batch_tokens is not None else mesh.data)

    def choose(layerwise: Literal["yes", "no"]) -> BatchChoice:
        return choose_batch_tokens(
            config,
            options.dtype,
            dataclasses.replace(options, layerwise=layerwise).settings_for(config),
            rows,
            default=default,
            at_hand=at_hand,
            fixed=options.batch_tokens is not None,
            mesh=mesh,
        )

    layerwise: Literal["yes", "no"] = "yes" if options.layerwise == "yes" else "no"
    choice = choose(layerwise)
    may_be = options.layerwise == "auto" and options.settings_for(config).can_be_layerwise
    may_be = may_be and mesh.model == 1
    if not choice.fits and may_be:
        layerwise, choice = "yes", choose("yes")
    if not choice.fits and not on_cpu and options.batch_tokens is None:
        raise UserError(
            f"one example needs {memory_shortage(choice)}; give --dtype=bfloat16, a smaller "
            "--max_length, fewer --parameters, no --similarity, or a --mesh that splits the weights "
            "over more devices"
        )
    settled = dataclasses.replace(options, batch_tokens=choice.batch_tokens, layerwise=layerwise)
    return settled, choice


def recorded_date(output_dir: str | Path) -> str | None:
    """The date of the run that stands in a directory; None where there is no run.

    Raises:
        OutputError: its run.json is damaged.
    """
    run = load_run(output_dir)
    return run["identity"].get("options", {}).get("date") if run else None


def with_recorded_choices(options: AnalyzeOptions, output_dir: str | Path) -> AnalyzeOptions:
    """The options with what was chosen by memory for the run that stands in a directory, if any.

    A run is continued as it was begun, also where other memory is at hand.

    Raises:
        OutputError: its run.json is damaged.
    """
    run = load_run(output_dir)
    recorded = run["identity"].get("options", {}) if run else {}
    if options.batch_tokens is None:
        options = dataclasses.replace(options, batch_tokens=recorded.get("batch_tokens"))
    if options.layerwise == "auto" and recorded.get("layerwise") in ("yes", "no"):
        options = dataclasses.replace(options, layerwise=recorded["layerwise"])
    return options


def date_for(options: AnalyzeOptions, recorded: Iterable[str | None]) -> str:
    """The day that chat templates print: as asked, as in the first run that is there, or today."""
    if options.date is not None:
        return read_date(options.date).isoformat()
    return next(filter(None, recorded), None) or datetime.date.today().isoformat()
