"""Checkpoints on disk as named arrays: what a reader of weights needs, whatever the file format."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgrad.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class WeightSource(Protocol):
    """Named tensors that are read one by one."""

    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, without reading its values."""

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, in the dtype of the file (dequantized where it is quantized)."""


class Fingerprint:
    """sha256 over the tensors' names, shapes and values, taken while they are read."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Take in one tensor; the order of the calls does not matter."""
        digest = hashlib.sha256(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
        self._digests[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        """64 hex digits for all tensors taken in."""
        lines = "\n".join(f"{name} {self._digests[name]}" for name in sorted(self._digests))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; one-line `UserError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: not a complete Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class SafetensorsDirectory:
    """A Hugging Face model directory: one model.safetensors, or shards with an index.

    Raises:
        UserError: no weights; pickled weights only; a missing, truncated or corrupt shard; a tensor in
            two shards; an index that names tensors which its shards do not hold.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[Path, Any] = {}
        files = self._find_files(directory)
        for path in files:
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if name in self._file_of:
                    raise UserError(
                        f"{path}: weight {name} stands in {self._file_of[name].name} as well; "
                        "a checkpoint must hold each weight once"
                    )
                self._file_of[name] = path
                self._shapes[name] = tuple(handle.get_slice(name).get_shape())

    def _find_files(self, directory: Path) -> list[Path]:
        index_path = directory / INDEX_NAME
        if index_path.exists():
            weight_map = read_json_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index_path} has no weight_map; download it again")
            names = sorted(set(map(str, weight_map.values())))
            # The index comes from strangers: a shard's name must not lead out of the directory.
            unsafe = [name for name in names if Path(name).name != name]
            if unsafe:
                raise UserError(f"{index_path} names {unsafe[0]!r}, which is not a plain file name")
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UserError(
                    f"{directory}: {len(missing)} of {len(names)} shards missing: "
                    f"{', '.join(missing[:4])}; download the model again"
                )
            return [directory / name for name in names]
        if (directory / SINGLE_NAME).is_file():
            return [directory / SINGLE_NAME]
        others = sorted(directory.glob("*.safetensors"))
        if len(others) == 1:
            return others
        if others:
            raise UserError(
                f"{directory}: {len(others)} .safetensors files but no {INDEX_NAME} to join them"
            )
        pickles = sorted({p.name for pattern in PICKLES for p in directory.glob(pattern)})
        if pickles:
            raise UserError(
                f"{directory} has pickled weights only ({', '.join(pickles[:3])}): refused, because "
                "unpickling runs code from the file; convert the model to safetensors first"
            )
        raise UserError(
            f"{directory} has no weights: expected {SINGLE_NAME}, or shards with {INDEX_NAME}"
        )

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{path} is not a complete safetensors file ({error}); "
                    f"it has {path.stat().st_size} bytes: download it again"
                ) from error
        return self._handles[path]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in the dtype of the file."""
        try:
            return self._open(self._file_of[name]).get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{self._file_of[name]}: {name} cannot be read: {error}") from error


def as_dtype(values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` as a floating dtype; integers, booleans and complex numbers are no weights."""
    is_float = values.dtype.kind == "f" or values.dtype in (
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    )
    if not is_float:
        raise ValueError(f"dtype {values.dtype} is not a floating one")
    return values.astype(dtype, copy=False)


def expand_layers(template: str, num_layers: int) -> Iterator[str]:
    """A key's names: one a layer where it has "{layer}", itself where not."""
    if "{layer}" not in template:
        yield template
    else:
        for layer in range(num_layers):
            yield template.replace("{layer}", str(layer))
