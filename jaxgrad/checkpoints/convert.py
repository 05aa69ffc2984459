"""Converts a checkpoint of any format to Orbax, and compares the result with its source."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxgrad.checkpoints.fill import compare_with_source, stored_dtypes
from jaxgrad.checkpoints.load import Checkpoint, open_checkpoint
from jaxgrad.checkpoints.saved import (
    DESCRIPTION,
    RULE,
    TOKENIZER,
    WEIGHTS,
    SavedDecoder,
    file_sizes,
    write_description,
    write_weights,
)
from jaxgrad.checkpoints.sources import WeightSource
from jaxgrad.checkpoints.tokenizer_settings import TEMPLATE_FOLDER
from jaxgrad.errors import UserError
from jaxgrad.models.decoder import num_parameters, parameter_shapes
from jaxgrad.options import ModelOptions
from jaxgrad.paths import expanded
from jaxgrad.results.provenance import provenance

# With config.json, where transformers looks for the tokenizer's class.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
# Orbax keeps part of what it writes in memory: 0.63 of the weights in benchmarks/loading.
WRITING_SHARE = 0.7
SPARE_BYTES = 64 * 2**20  # tokenizer, metadata, rounding up to blocks


def convert_model(
    model_path: str | None,
    output_dir: str | Path,
    options: ModelOptions = ModelOptions(),
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> SavedDecoder:
    """Write a model as an Orbax checkpoint that `load_model` and `bin/analyze` take.

    The weights keep the source's dtype (GGUF: dequantized to float32; with an adapter: merged, in float32),
    so an analysis in any dtype gives the same bits as on the source. All is written to NAME.partial, read
    back, compared with the source and then renamed to `output_dir`.

    Args:
        model_path: as `load_model` takes it.
        output_dir: will be made. If it holds this conversion already, nothing is done.
        options: an adapter's base, and a hub id's revision.
        say: takes lines for the user.
        progress: show bars on stderr.

    Raises:
        UserError: what is wrong with the model or the directory; the disk is full; the weights read back
            differ from the source's.
    """
    output_dir = Path(expanded(str(output_dir)))
    _check_free(output_dir)
    checkpoint = open_checkpoint(model_path, options)
    source = checkpoint.source
    if isinstance(source, SavedDecoder):
        raise UserError(f"--model_path {model_path} is a converted checkpoint already; copy it")
    if SavedDecoder.is_one(output_dir):
        return _reuse(output_dir, checkpoint, say)
    size = _stored_bytes(checkpoint, source)
    say(
        f"{checkpoint.name}: {num_parameters(checkpoint.config) / 1e6:.1f}M parameters, "
        f"{checkpoint.family.title}; needs {(1 + WRITING_SHARE) * size / 1e9:.2f} GB of memory and "
        f"{size / 1e9:.2f} GB of disk"
    )
    for note in checkpoint.notes:
        say(note)
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # from an interrupted conversion
        partial.mkdir(parents=True)
        _check_space(partial, size)
        model = checkpoint.load(None, progress=progress)
        parameters = write_weights(partial, model.state)
        _write_tokenizer(checkpoint, partial / TOKENIZER)
        description = {
            "config": checkpoint.raw_config,
            "parameters": parameters,
            "weight_files": file_sizes(partial / WEIGHTS),
            "source": {
                "model": checkpoint.name,
                "origin": checkpoint.origin,
                "files": checkpoint.files,
                "weights_sha256": model.fingerprint,
            },
            RULE: checkpoint.loaded_tokenizer.rule,
            "provenance": provenance(),
        }
        write_description(partial, description)
        del model
        _verify(partial, checkpoint, source, progress)
        if output_dir.exists():
            output_dir.rmdir()  # empty: `_check_free` made sure
        partial.rename(output_dir)
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror or error}") from error
    say(f"written and compared with its source, bit by bit: {output_dir}")
    return SavedDecoder(output_dir)


def _check_free(output_dir: Path) -> None:
    if SavedDecoder.is_one(output_dir):
        return
    try:
        taken = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used: {error.strerror}") from error
    if taken:
        raise UserError(
            f"--output_dir {output_dir} exists and is not a converted checkpoint; "
            "give a new directory"
        )


def _reuse(output_dir: Path, checkpoint: Checkpoint, say: Callable[[str], None]) -> SavedDecoder:
    saved = SavedDecoder(output_dir)
    files = {name: list(stat) for name, stat in checkpoint.files.items()}
    if saved.description["source"].get("files") != files:
        raise UserError(
            f"--output_dir {output_dir} holds the conversion of other files "
            f"({saved.description['source'].get('model')}); give a new directory"
        )
    say(f"{output_dir} holds this conversion already: nothing to do")
    return saved


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size + SPARE_BYTES:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.2f} GB free, the checkpoint needs "
            f"{(size + SPARE_BYTES) / 1e9:.2f} GB; free some, or give another --output_dir"
        )


def _stored_bytes(checkpoint: Checkpoint, source: WeightSource) -> int:
    shapes = parameter_shapes(checkpoint.config)
    dtypes = stored_dtypes(checkpoint.config, checkpoint.family, source)
    return sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())


def _write_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the source's tokenizer files; for a GGUF file, save the tokenizer made from it."""
    target.mkdir()
    place = checkpoint.tokenizer_place
    if place.is_file():
        checkpoint.tokenizer.save_pretrained(target)
        return
    for pattern in TOKENIZER_FILES:
        for path in place.glob(pattern):
            shutil.copyfile(path, target / path.name)
    templates = place / TEMPLATE_FOLDER
    if templates.is_dir():
        shutil.copytree(templates, target / TEMPLATE_FOLDER)


def _verify(partial: Path, checkpoint: Checkpoint, source: WeightSource, progress: bool) -> None:
    """Read back what was written and compare it with the source's files, read again."""
    saved = SavedDecoder(partial)
    family, config = saved.read_config()
    if (family, config) != (checkpoint.family, checkpoint.config):
        raise UserError(f"{partial}/{DESCRIPTION} does not give the source's config back")
    with jax.enable_x64(True):
        _, state = saved.restore(config, None)
        compare_with_source(config, family, source, state, where=str(partial), progress=progress)
    tokenizer = saved.read_tokenizer().tokenizer
    if _tokenizer_state(tokenizer) != _tokenizer_state(checkpoint.tokenizer):
        raise UserError(
            f"{saved.tokenizer_directory}: the tokenizer is not the source's when it is read back; "
            "give the model as a Hugging Face directory"
        )


def _tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special
