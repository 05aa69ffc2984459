"""A decoder that `bin/convert` wrote: Orbax arrays, config, tokenizer, and their source.

D/jaxgrad_checkpoint.json   written last: format, config, provenance, the parameters' shapes
D/weights/                  one Orbax array per parameter, in the dtype of the source
D/tokenizer/                the source's tokenizer files
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxgrad.checkpoints.sources import FLOATS, read_json_object
from jaxgrad.checkpoints.tokenizer import LoadedTokenizer, tokenizer_from_directory
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import (
    abstract_decoder,
    named_parameters,
    parameter_shapes,
    with_parameters,
)
from jaxgrad.models.families import Family, read_config
from jaxgrad.models.sharding import parameter_shardings

FORMAT = 1
DESCRIPTION, WEIGHTS, TOKENIZER = "jaxgrad_checkpoint.json", "weights", "tokenizer"
RULE = "tokenizer_rule"  # of the description: what made the source's tokens
CHUNK_BYTES = 64 * 2**20  # of an array on disk: each process of a pod reads only its own chunks


class SavedDecoder:
    """A directory that `bin/convert` wrote.

    Raises:
        UserError: it is incomplete, or of another format.
    """

    def __init__(self, directory: Path) -> None:
        self.where, self._directory = str(directory), directory
        self._description = read_json_object(directory / DESCRIPTION)
        if self._description.get("format") != FORMAT:
            raise UserError(
                f"{directory / DESCRIPTION} is of format {self._description.get('format')!r}, this "
                f"jaxgrad reads {FORMAT}; convert the model again"
            )
        for name in ("config", "source", "parameters", "weight_files"):
            if not isinstance(self._description.get(name), dict):
                raise self._damaged(f"{DESCRIPTION} has no {name}")
        for folder in (WEIGHTS, TOKENIZER):
            if not (directory / folder).is_dir():
                raise self._damaged(f"{folder}/ is missing")
        # Checked here, because Orbax starts reading before it checks.
        found, wanted = file_sizes(directory / WEIGHTS), self._description["weight_files"]
        for name, size in wanted.items():
            if found.get(name) != size:
                there = (
                    "is missing" if name not in found else f"has {found[name]} bytes, not {size}"
                )
                raise self._damaged(f"{WEIGHTS}/{name} {there}")

    @staticmethod
    def is_one(directory: Path) -> bool:
        """Whether a directory claims to be a converted checkpoint."""
        return (directory / DESCRIPTION).is_file()

    @property
    def description(self) -> dict[str, Any]:
        """The content of jaxgrad_checkpoint.json."""
        return self._description

    @property
    def tokenizer_directory(self) -> Path:
        """The directory of the tokenizer's files."""
        return self._directory / TOKENIZER

    def read_tokenizer(self) -> LoadedTokenizer:
        """The tokenizer.

        Raises:
            UserError: it cannot be read; an older version converted it from a GGUF file of Llama's and left
                out spaces behind special tokens.
        """
        files = self._description["source"].get("files") or {}
        if RULE not in self._description and any(str(name).endswith(".gguf") for name in files):
            splits = read_json_object(self.tokenizer_directory / "tokenizer.json").get(
                "pre_tokenizer"
            )
            if isinstance(splits, dict) and splits.get("type") == "Metaspace":
                raise UserError(
                    f"{self.where} was converted by an older jaxgrad, whose tokenizer left out the space "
                    "behind special tokens; convert the model again"
                )
        return tokenizer_from_directory(self.tokenizer_directory)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source's weights, so a run may continue with either."""
        return str(self._description["source"].get("weights_sha256"))

    def read_config(self) -> tuple[Family, DecoderConfig]:
        """The family and the config.

        Raises:
            UserError: the config is not understood, or the arrays are not those of its decoder.
        """
        family, config = read_config(self._description["config"], f"{self.where}/{DESCRIPTION}")
        try:
            saved = {name: tuple(entry["shape"]) for name, entry in self._parameters.items()}
            dtypes = {entry["dtype"] for entry in self._parameters.values()}
        except (KeyError, TypeError) as error:
            raise self._damaged(f"its parameters are not described: {error}") from error
        if saved != parameter_shapes(config) or not dtypes <= set(FLOATS.values()):
            raise self._damaged("its parameters are not those of its config")
        return family, config

    @property
    def _parameters(self) -> dict[str, Any]:
        return self._description["parameters"]

    def restore(
        self, config: DecoderConfig, dtype: Any, mesh: Mesh | None = None
    ) -> tuple[nnx.GraphDef, nnx.State]:
        """The decoder. Orbax reads its arrays straight onto the device, or onto each device of a mesh.

        Args:
            config: from `read_config`.
            dtype: of the arrays; None for the stored one.
            mesh: the devices that get them, split by `jaxgrad.models.sharding`; None for one device.

        Raises:
            UserError: Orbax cannot read them.
        """
        graphdef, abstract = abstract_decoder(config, dtype or np.float32)
        return graphdef, with_parameters(abstract, self._restore_arrays(config, dtype, mesh))

    def _restore_arrays(
        self, config: DecoderConfig, dtype: Any, mesh: Mesh | None
    ) -> dict[str, jax.Array]:
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        shardings: Mapping[str, Sharding] = {}
        if mesh is not None:
            shardings = parameter_shardings(config, self._parameters, mesh)
        wanted = {
            name: ocp.ArrayRestoreArgs(
                sharding=shardings.get(name, one_device),
                global_shape=tuple(entry["shape"]),
                dtype=np.dtype(dtype or entry["dtype"]),
            )
            for name, entry in self._parameters.items()
        }
        try:
            largest = max(math.prod(w.global_shape) * w.dtype.itemsize for w in wanted.values())
            with _checkpointer(largest) as checkpointer:
                return checkpointer.restore(
                    self._directory.resolve() / WEIGHTS,
                    args=ocp.args.PyTreeRestore(restore_args=wanted),
                )
        except Exception as error:  # Orbax and TensorStore have no common error class
            reason = _first_line(error)
            raise self._damaged(f"Orbax cannot restore its weights: {reason}") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.where} is incomplete or damaged ({what}); convert the model again")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _checkpointer(largest_bytes: int) -> Iterator[ocp.Checkpointer]:
    """An Orbax checkpointer that transfers no more at a time than the largest array, the least it can.

    Orbax logs errors as tracebacks. They are silenced, because it raises the errors too.
    """
    gigabytes = math.ceil(largest_bytes / 1e9)
    previous_hook = sys.unraisablehook

    def ignore_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    # If an array cannot be read, Orbax closes its event loop while TensorStore still reads the others, and
    # each of these reports the closed loop. They may come late, so after a failure the hook stays.
    sys.unraisablehook = ignore_closed_loops
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    # Each process reads on its own. Otherwise Orbax synchronizes all of them through their devices.
    only_this_process = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=gigabytes,
        save_device_host_concurrent_gb=gigabytes,
        restore_concurrent_gb=gigabytes,
        multiprocessing_options=only_this_process,
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=only_this_process) as checkpointer:
            yield checkpointer
        sys.unraisablehook = previous_hook
    finally:
        logging.set_verbosity(verbosity)


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file below a directory, by its path relative to it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def write_weights(directory: Path, state: nnx.State) -> dict[str, dict[str, Any]]:
    """Write a decoder's arrays below `directory`; returns the description's `parameters`.

    Raises:
        UserError: Orbax cannot write them.
    """
    arrays = named_parameters(state)
    options = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    with _checkpointer(max(array.nbytes for array in arrays.values())) as checkpointer:
        # TensorStore keeps a data file in memory until it has this size.
        save = ocp.args.PyTreeSave(arrays, options, ocdbt_target_data_file_size=CHUNK_BYTES)
        try:
            checkpointer.save(directory.resolve() / WEIGHTS, args=save)
        except Exception as error:  # as in `_restore_arrays`
            reason = _first_line(error)
            raise UserError(
                f"{directory} cannot be written: {reason}; is the disk full?"
            ) from error
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in arrays.items()
    }


def write_description(directory: Path, description: Mapping[str, Any]) -> None:
    """Write jaxgrad_checkpoint.json. It must come last: it marks the directory as complete."""
    text = json.dumps({"format": FORMAT, **description}, indent=1, ensure_ascii=False)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
