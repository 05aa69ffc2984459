"""A model from wherever it lies: read its config, open its weights, load them onto its devices."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from jaxgrad.checkpoints.fill import CanonicalSource, check_weights, fill_decoder
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxgrad.checkpoints.places import resolve_model
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.checkpoints.sources import SafetensorsDirectory, WeightSource, read_model_config
from jaxgrad.checkpoints.tokenizer import tokenizer_from_directory
from jaxgrad.dtypes import DTYPES
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family, read_config
from jaxgrad.models.sharding import bytes_on_a_device, check_mesh, make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights on the device, or on a mesh of devices, and its tokenizer.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        fingerprint: sha256 over the checkpoint's weights, as they stand in the files.
        mesh: where the weights lie, split as `jaxgrad.models.sharding` has it; None for one device.
        weight_bytes: size of the weights on a device.
    """

    name: str
    config: DecoderConfig
    graphdef: nnx.GraphDef
    state: nnx.State
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    dtype: str
    mesh: Mesh | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device, on a mesh on each of its devices."""
        return sum(bytes_on_a_device(leaf) for leaf in jax.tree.leaves(self.state))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened: everything but the values of its weights.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        path: the directory or the GGUF file.
        raw_config: its config.json, or what a GGUF file or a converted checkpoint has in its place.
        files: file name -> (bytes, modification time in ns), to notice that a model was replaced.
    """

    name: str
    path: Path
    raw_config: dict[str, Any]
    config: DecoderConfig
    family: Family
    source: WeightSource | SavedDecoder
    tokenizer: PreTrainedTokenizerFast
    files: dict[str, tuple[int, int]]

    def load(
        self,
        dtype: str | None = "float32",
        *,
        mesh: Mesh | None = None,
        progress: bool = False,
    ) -> LoadedModel:
        """Read the weights onto the device, or each device's part of them onto the devices of a mesh.

        Args:
            dtype: as `load_model` takes it; None for that of the files, parameter by parameter.
            mesh: from `jaxgrad.models.sharding.make_mesh`; None for one device.
            progress: show a bar on stderr.

        Raises:
            UserError: see `load_model`.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        kind = None if dtype is None else DTYPES[dtype]
        with jax.enable_x64(dtype in (None, "float64")):
            if isinstance(self.source, SavedDecoder):
                graphdef, state = self.source.restore(self.config, kind, mesh)
                fingerprint = self.source.fingerprint
            else:
                graphdef, state, fingerprint = fill_decoder(
                    self.config, self.family, self.source, kind, mesh=mesh, progress=progress
                )
        return LoadedModel(
            self.name,
            self.config,
            graphdef,
            state,
            self.tokenizer,
            fingerprint,
            dtype or "stored",
            mesh,
        )


def open_checkpoint(model_path: str | None = None) -> Checkpoint:
    """Find a model and read its config, its tokenizer and the names and shapes of its weights.

    Args:
        model_path: a Hugging Face directory (safetensors), a directory of `bin/convert`, a .gguf
            file, a hub id, or None for the embedded default.

    Raises:
        UserError: whatever is wrong with the model, in one line.
    """
    place = resolve_model(model_path)
    path, files = place.path, [place.path]
    source: GgufFile | CanonicalSource | SavedDecoder
    # What is cheap to find wrong comes first: the config, the weights' names, then the tokenizer.
    if path.is_file():
        source = GgufFile(path)
        raw = source.hf_config()
        family, config = read_config(raw, source.where)
        check_weights(config, family, source)
        tokenizer = tokenizer_from_gguf(source)
    elif SavedDecoder.is_one(path):
        source = SavedDecoder(path)
        raw = source.description["config"]
        family, config = source.read_config()
        tokenizer = tokenizer_from_directory(source.tokenizer_directory)
    else:
        raw = read_model_config(path)
        family, config = read_config(raw, f"{path}/config.json")
        source = CanonicalSource(SafetensorsDirectory(path), family)
        check_weights(config, family, source)
        tokenizer = tokenizer_from_directory(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    stats = {file.name: file.stat() for file in files}
    sizes = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    return Checkpoint(place.name, path, raw, config, family, source, tokenizer, sizes)


def load_model(
    model_path: str | None = None, *, dtype: str = "float32", mesh: str = "1x1"
) -> LoadedModel:
    """Load a checkpoint into the Flax decoder.

    Args:
        model_path: as `open_checkpoint` takes it.
        dtype: "float32", "bfloat16" or "float64", for weights and arithmetic; norms, softmax, rope
            and loss are at least float32.
        mesh: "DxM", the devices of this process that examples and weights are split over.

    Raises:
        UserError: whatever is wrong with the model or the mesh, in one line.
    """
    shape = parse_mesh(mesh)
    if shape is None:
        raise UserError("mesh='auto' is decided by what is measured: give DxM, such as '4x2'")
    devices = make_mesh(shape)
    checkpoint = open_checkpoint(model_path)
    check_mesh(checkpoint.config, shape)
    return checkpoint.load(dtype, mesh=devices)
