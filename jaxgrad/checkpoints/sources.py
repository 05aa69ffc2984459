"""Weights in files as named arrays, whatever the format; the reader of safetensors directories."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgrad.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# An adapter, in the form of the library PEFT.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK_BYTES = 32 * 2**20  # read at once of a large tensor
# A file is reopened after so many bytes: pages of a mapped file count as this process's memory until it is
# unmapped.
REOPEN_BYTES = 64 * 2**20
PICKLES = ("pytorch_model.bin", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Addition:
    """What an adapter adds to a weight: `scale * left @ right`.

    Attributes:
        left: [rows, r]; for a bias [rows, 1].
        right: [r, columns]; for a bias [1].
        scale: a factor.
        names: what kind of adapter weight `left` and `right` are, such as "lora_B" and "lora_A".
        dtype: of the sum.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    names: tuple[str, str]
    dtype: np.dtype

    def added_to(self, first_row: int, values: np.ndarray) -> np.ndarray:
        """Rows of the weight, from `first_row` on, with the addition.

        The product and the sum are float64, so that every machine rounds to the same values, but for
        one in about 10^9.
        """
        result = np.empty(values.shape, self.dtype)
        right = self.right.astype(np.float64)
        for begin, end in row_blocks(values.shape, np.dtype(np.float64).itemsize):
            rows = self.left[first_row + begin : first_row + end].astype(np.float64) @ right
            result[begin:end] = values[begin:end].astype(np.float64) + self.scale * rows
        return result

    def parts(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        """What the fingerprint of a weight's model covers besides the weight: names and arrays."""
        for part, values in zip(self.names, (self.left, self.right), strict=True):
            yield f"{name} + {part}", values
        yield f"{name} + scale", np.array([self.scale])


class Tensors(Protocol):
    """Named tensors, read one by one."""

    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the cheapest order to read."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives; only for a tensor that can be read."""

    def why_unreadable(self, name: str) -> str | None:
        """Why the tensor cannot be read as a weight; None if it can."""

    def read(self, name: str) -> np.ndarray:
        """The values in the dtype of the file, or dequantized."""

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values; a large tensor comes in blocks of rows and is never whole in memory."""

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the same values, a slice along each axis. Little else is read where files allow it."""


class WeightSource(Tensors, Protocol):
    """A model's weights. `dtype` is theirs with what `addition` adds."""

    def addition(self, name: str) -> Addition | None:
        """What the reader must add to the values of `read`; None for nothing."""


class Fingerprint:
    """sha256 over the tensors' names, shapes and values, updated while they are read."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}
        self._others: dict[str, str] = {}

    def add(self, name: str, shape: tuple[int, ...], block: np.ndarray) -> None:
        """Add a tensor, whole or block by block. The order of the tensors does not matter.

        Args:
            name: the tensor's.
            shape: of the whole tensor.
            block: its next values, in C order.
        """
        if name not in self._digests:
            self._digests[name] = hashlib.sha256(f"{name} {block.dtype} {shape} ".encode())
        self._digests[name].update(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data)

    def by_tensor(self) -> dict[str, str]:
        """The digests of the tensors added here, by name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def add_others(self, digests: Mapping[str, str]) -> None:
        """Add tensors that another process has read: its `by_tensor`."""
        self._others |= digests

    def hexdigest(self) -> str:
        """64 hex digits over all tensors added."""
        digests = self._others | self.by_tensor()
        lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_model_config(directory: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face model directory.

    Raises:
        UserError: it has none; the message says what the directory may be instead.
    """
    path = directory / "config.json"
    if path.exists():
        return read_json_object(path)
    gguf_files = sorted(directory.glob("*.gguf"))
    if (directory / ADAPTER_CONFIG).exists():
        advice = (
            "it holds an adapter: give it with --adapter=auto and its base as --base_model_path"
        )
    elif gguf_files:
        advice = f"it holds GGUF files: give one of them, such as {gguf_files[0]}"
    else:
        advice = "give the whole directory that a model was saved or downloaded to"
    raise UserError(f"{directory} is not a Hugging Face model: it has no config.json; {advice}")


class SafetensorsFiles:
    """Safetensors files that are read as one.

    Args:
        where: what they are, for messages.
        files: in the order to read them.

    Raises:
        UserError: a file is truncated or corrupt; a tensor is in two files.
    """

    def __init__(self, where: str, files: list[Path]) -> None:
        self.where = where
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._open_file: tuple[Path, Any] | None = None
        self._bytes_read = 0
        for path in files:
            handle = self._open(path)
            for name in handle.offset_keys():
                if name in self._file_of:
                    raise UserError(
                        f"{path}: weight {name} is also in {self._file_of[name].name}; "
                        "a checkpoint must hold each weight once"
                    )
                self._file_of[name] = path
                view = handle.get_slice(name)
                self._shapes[name], self._dtypes[name] = tuple(view.get_shape()), view.get_dtype()

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}); "
                f"it has {path.stat().st_size} bytes: download it again"
            ) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order of the files."""
        return self._shapes

    def dtype(self, name: str) -> np.dtype:
        """The dtype of the file."""
        return np.dtype(FLOATS[self._dtypes[name]])

    def why_unreadable(self, name: str) -> str | None:
        """The dtype, if it is no float, or float8, whose scales no family here reads."""
        dtype = self._dtypes[name]
        return None if dtype in FLOATS else f"has dtype {dtype}, not {', '.join(FLOATS.values())}"

    def read(self, name: str) -> np.ndarray:
        """The tensor's values in the dtype of the file."""
        return self._take(name, None)

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values; a large tensor comes in blocks of rows."""
        bounds = row_blocks(self._shapes[name], self.dtype(name).itemsize)
        if len(bounds) == 1:
            yield self.read(name)
        else:
            yield from (self._take(name, slice(*bound)) for bound in bounds)

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the same values; of a mapped file, its pages only."""
        return self._take(name, part)

    def _take(self, name: str, part: slice | tuple[slice, ...] | None) -> np.ndarray:
        path = self._file_of[name]
        if self._open_file is None or self._open_file[0] != path or self._bytes_read > REOPEN_BYTES:
            self._open_file = None  # closes the previous file first
            self._open_file, self._bytes_read = (path, self._open(path)), 0
        try:
            file = self._open_file[1]
            values = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from error
        self._bytes_read += values.nbytes
        return values


class SafetensorsDirectory(SafetensorsFiles):
    """A Hugging Face model directory: one model.safetensors, or shards with an index.

    Raises:
        UserError: no weights; pickled weights only; a missing, truncated or corrupt shard; a tensor
            in two shards; an index that names the wrong shard for a tensor.
    """

    def __init__(self, directory: Path) -> None:
        weight_map = self._weight_map(directory / INDEX_NAME)
        super().__init__(str(directory), self._find_files(directory, weight_map))
        self._check_index(directory, weight_map)

    def _weight_map(self, index_path: Path) -> dict[str, str]:
        """Weight -> file, from the index; empty if there is no index."""
        if not index_path.exists():
            return {}
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index_path} has no weight_map; download it again")
        for file in weight_map.values():
            # The index is not trusted: a name must not lead out of the directory, nor be too long for
            # a file system.
            if not isinstance(file, str) or Path(file).name != file or len(file) > 200:
                shown = repr(file)[:200]
                raise UserError(f"{index_path} names {shown}, which is not a plain file name")
        return weight_map

    def _check_index(self, directory: Path, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            found = self._file_of.get(name)
            if found != directory / file:
                there = f"it is in {found.name}" if found else "no shard has it"
                raise UserError(
                    f"{directory / INDEX_NAME} places weight {name} in {file}, but {there}; "
                    "the index and the shards are of different models: download the model again"
                )

    def _find_files(self, directory: Path, weight_map: dict[str, str]) -> list[Path]:
        if weight_map:
            names = sorted(set(weight_map.values()))
            if (directory / SINGLE_NAME).exists() and SINGLE_NAME not in names:
                raise UserError(
                    f"{directory} has both {SINGLE_NAME} and {INDEX_NAME} with other shards, which "
                    "may be two models; remove one of the two"
                )
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UserError(
                    f"{directory}: {len(missing)} of {len(names)} shards missing: "
                    f"{', '.join(missing[:4])}; download the model again"
                )
            return [directory / name for name in names]
        if (directory / SINGLE_NAME).is_file():
            return [directory / SINGLE_NAME]
        others = whole_weight_files(directory)
        if len(others) == 1:
            return others
        if others:
            raise UserError(
                f"{directory}: {len(others)} .safetensors files but no {INDEX_NAME} to join them"
            )
        refuse_pickles(directory, "convert the model to safetensors first")
        raise UserError(
            f"{directory} has no weights: expected {SINGLE_NAME}, or shards with {INDEX_NAME}"
        )


def whole_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, without that of an adapter."""
    return sorted(p for p in directory.glob("*.safetensors") if p.name != ADAPTER_NAME)


def refuse_pickles(directory: Path, mend: str) -> None:
    """Raise a `UserError` if a directory holds pickled weights."""
    pickles = sorted({p.name for pattern in PICKLES for p in directory.glob(pattern)})
    if pickles:
        raise UserError(
            f"{directory} has pickled weights only ({', '.join(pickles[:3])}): refused, "
            f"because unpickling runs code from the file; {mend}"
        )


def row_blocks(shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int]]:
    """(first row, end) of blocks of at most `BLOCK_BYTES`; one block for a scalar."""
    num_rows = shape[0] if shape else 1
    rows = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    return [(begin, min(begin + rows, num_rows)) for begin in range(0, num_rows, rows)] or [(0, 0)]
