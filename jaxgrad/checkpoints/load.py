"""Opens a checkpoint of any format and loads its weights onto one device or a mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from jaxgrad.checkpoints.fill import fill_decoder
from jaxgrad.checkpoints.opening import open_model
from jaxgrad.checkpoints.places import resolve_model
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.checkpoints.sources import WeightSource
from jaxgrad.checkpoints.tokenizer import LoadedTokenizer
from jaxgrad.dtypes import DTYPES
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family
from jaxgrad.models.sharding import bytes_on_a_device, check_mesh, make_mesh, parse_mesh
from jaxgrad.options import ModelOptions
from jaxgrad.processes.exchange import Exchange


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights on a device or a mesh, and its tokenizer.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        fingerprint: sha256 over the checkpoint's weights, as stored in the files.
        dtype: of the weights, a key of `DTYPES`; "stored" if they kept that of the files.
        mesh: the devices that hold the weights, split by `jaxgrad.models.sharding`; None for one device.
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
        """Bytes of the weights on each device."""
        return sum(bytes_on_a_device(leaf) for leaf in jax.tree.leaves(self.state))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open model: everything but the values of its weights.

    Attributes:
        name: what the user asked for, or the embedded default's name.
        path: the directory or the GGUF file.
        raw_config: its config.json; for a GGUF file, made from the metadata.
        loaded_tokenizer: the tokenizer, with the rule that makes its tokens.
        files: file name -> (bytes, modification time in ns), to notice that a model was replaced.
        tokenizer_place: the directory or the GGUF file of the tokenizer.
        notes: lines for the user: what of the weights' names was stripped, what was merged.
        origin: what run.json keeps of where the weights are from: a hub id's commit, an adapter's base.
    """

    name: str
    path: Path
    raw_config: dict[str, Any]
    config: DecoderConfig
    family: Family
    source: WeightSource | SavedDecoder
    loaded_tokenizer: LoadedTokenizer
    files: dict[str, tuple[int, int]]
    tokenizer_place: Path
    notes: tuple[str, ...] = ()
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer."""
        return self.loaded_tokenizer.tokenizer

    def lines(self) -> list[str]:
        """What a run says of its model."""
        return [*self.notes, *self.loaded_tokenizer.lines()]

    def load(
        self,
        dtype: str | None = "float32",
        *,
        mesh: Mesh | None = None,
        progress: bool = False,
        exchange: Exchange | None = None,
    ) -> LoadedModel:
        """Read the weights onto the device, or split over a mesh.

        Args:
            dtype: a key of `DTYPES`; None for that of the files, parameter by parameter.
            mesh: from `jaxgrad.models.sharding.make_mesh`; None for one device.
            progress: show a bar on stderr.
            exchange: of the processes that the mesh spans: with it they share the reading.

        Raises:
            UserError: the dtype is unknown; the weights cannot be read or do not fit the config.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        jax_dtype = None if dtype is None else DTYPES[dtype]
        with jax.enable_x64(dtype in (None, "float64")):
            if isinstance(self.source, SavedDecoder):
                graphdef, state = self.source.restore(self.config, jax_dtype, mesh)
                fingerprint = self.source.fingerprint
            else:
                graphdef, state, fingerprint = fill_decoder(
                    self.config,
                    self.family,
                    self.source,
                    jax_dtype,
                    mesh=mesh,
                    progress=progress,
                    exchange=exchange,
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


def open_checkpoint(
    model_path: str | None = None, options: ModelOptions = ModelOptions()
) -> Checkpoint:
    """Find a model; read its config, its tokenizer, and the names and shapes of its weights.

    Args:
        model_path: a Hugging Face directory (safetensors) or that of a LoRA adapter, a directory that
            `bin/convert` wrote, a .gguf file, a hub id, or None for the embedded default.
        options: the adapter's base, and a hub id's revision.

    Raises:
        UserError: what is wrong with the model, in one line.
    """
    location = resolve_model(model_path, options.revision)
    model = open_model(location, options)
    return Checkpoint(
        location.name,
        location.path,
        model.raw,
        model.config,
        model.family,
        model.source,
        model.tokenizer(),
        model.files,
        model.tokenizer_place,
        model.notes,
        model.origin,
    )


def load_model(
    model_path: str | None = None,
    *,
    dtype: str = "float32",
    mesh: str = "1x1",
    options: ModelOptions = ModelOptions(),
) -> LoadedModel:
    """Load a checkpoint into the Flax decoder.

    Args:
        model_path: as `open_checkpoint` takes it.
        dtype: "float32", "bfloat16" or "float64", of weights and arithmetic. Norms, softmax, rope and loss
            are at least float32.
        mesh: "DxM": D devices for the examples times M for the weights, of this process or, where these
            are too few, of all processes of `jax.distributed`, which then make the same calls.
        options: the adapter's base, and a hub id's revision.

    Raises:
        UserError: what is wrong with the model or the mesh, in one line.
    """
    shape = parse_mesh(mesh)
    if shape is None:
        raise UserError("mesh='auto' is decided by what is measured: give DxM, such as '4x2'")
    devices = make_mesh(shape)
    checkpoint = open_checkpoint(model_path, options)
    check_mesh(checkpoint.config, shape)
    return checkpoint.load(dtype, mesh=devices)
