"""A model from wherever it lies: read its config, open its weights, load them onto the device."""

import dataclasses

import jax
from flax import nnx
from transformers import PreTrainedTokenizerFast

from jaxgrad.dtypes import DTYPES
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family, read_config
from jaxgrad.models.fill import check_weights, fill_decoder
from jaxgrad.models.gguf_source import GgufFile
from jaxgrad.models.places import resolve_model
from jaxgrad.models.sources import SafetensorsDirectory, WeightSource, read_model_config
from jaxgrad.models.tokenizer import tokenizer_from_directory, tokenizer_from_gguf


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
    check_weights(config, family, source)
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
