"""GGUF files: config and weights, without torch.

llama.cpp's converter renames weights, interleaves the rotary pairs of q and k (Llama) and adds one to
the norms' weights (Gemma). Reading undoes this, so the arrays are those of the original Hugging Face
checkpoint, up to quantization.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxgrad.checkpoints.gguf_families import (
    GGUF_FAMILIES,
    MIXTURE,
    ROPE_DIVISORS,
    config_from_metadata,
)
from jaxgrad.checkpoints.sources import row_blocks
from jaxgrad.errors import UserError


class _BoundedReader(gguf.GGUFReader):
    """A reader that stops at the end of the file; gguf's own would go on for up to 2^64 values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"it ends inside the value at byte {offset} of {len(self.data)}")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Read a list in one step: a vocabulary has 256k values, and gguf's own takes 10 us for each."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        header = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, length = gguf.GGUFValueType(header[0][0]), int(header[1][0])
        if length > len(self.data):
            raise ValueError(f"a list of {length} values at byte {orig_offs}")
        types = [gguf.GGUFValueType.ARRAY, item] if length else [gguf.GGUFValueType.ARRAY]
        start = orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            strings, size = self._strings(start, length)
            return 12 + size, header + strings, list(range(2, 2 + length)), types
        scalar = self.gguf_scalar_to_np.get(item)
        if scalar is None:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, scalar, length)
        return 12 + int(values.nbytes), [*header, values], [2], types

    def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
        """`count` strings from byte `start` on, and their size in bytes, length fields included."""
        content = self.data.view(np.ndarray)  # slices of a memmap are ten times slower
        length = struct.Struct(np.dtype(np.uint64).newbyteorder(self.byte_order).str[0] + "Q")
        strings, offset = [], start
        for _ in range(count):
            begin = offset + length.size
            offset = begin + length.unpack_from(content, offset)[0] if begin <= len(content) else 0
            if not begin <= offset <= len(content):
                raise ValueError(f"it ends inside the value at byte {begin} of {len(content)}")
            strings.append(content[begin:offset])
        return strings, offset - start


class GgufFile:
    """One GGUF file: metadata by name, and weights by their Hugging Face names.

    Raises:
        UserError: the file is missing, truncated, not GGUF, or one of several parts; it is no language
            model of an architecture in `GGUF_FAMILIES`.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._reader = _BoundedReader(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except Exception as error:  # the reader may raise anything
            raise UserError(
                f"{path} is not a complete GGUF file ({str(error) or type(error).__name__}); "
                "download it again"
            ) from error
        self.architecture = self.metadata("general.architecture")
        self._refuse_other_kinds()
        self._family = GGUF_FAMILIES[self.architecture]
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        if len(self._tensors) != len(self._reader.tensors):
            raise UserError(f"{path} holds a weight under two names; download it again")
        # Llama's frequency divisors belong to the config (`hf_config`); they are no weight.
        self._rope_divisors = (
            self._tensors.pop(ROPE_DIVISORS, None) if self.architecture == "llama" else None
        )
        self._shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def _refuse_other_kinds(self) -> None:
        architecture, kind = self.architecture, self.metadata("general.type")
        parts = self.metadata("split.count")
        if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
            what = f" ({MIXTURE})" if str(architecture).endswith("moe") else ""
            raise UserError(
                f"{self.where}: GGUF architecture {architecture!r} is not supported{what}; "
                f"supported: {', '.join(GGUF_FAMILIES)}"
            )
        if kind not in (None, "model"):
            raise UserError(
                f"{self.where} holds a GGUF {kind!r}, not a model; give the model's file"
            )
        if parts not in (None, 0, 1):
            raise UserError(
                f"{self.where} is one of {parts} parts of a model; join them first: "
                "llama-gguf-split --merge FIRST_PART WHOLE"
            )

    def metadata(self, name: str) -> Any:
        """The value of a metadata entry; None if there is none."""
        field = self._reader.fields.get(name)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.where}: metadata {name} is damaged ({error}); download it again"
            ) from error

    def metadata_names(self, prefix: str) -> list[str]:
        """Names of the metadata entries that start with `prefix`, without it."""
        return [n.removeprefix(prefix) for n in self._reader.fields if n.startswith(prefix)]

    def _hf_name(self, name: str) -> str:
        names, parts = self._family.tensor_names, name.split(".")
        if parts[0] == "blk" and len(parts) > 2:
            template = names.get(".".join(["blk", "{layer}", *parts[2:]]))
            return name if template is None else template.replace("{layer}", parts[1])
        return names.get(name, name)  # `check_weights` names unknown ones

    def hf_config(self) -> dict[str, Any]:
        """The config.json of the model in this file.

        Numbers are float32 in the file: an epsilon of 1e-06 reads as 9.999999974752427e-07.

        Raises:
            UserError: metadata of the architecture are missing, impossible or not understood; all in one
                message.
        """
        prefix = f"{self.architecture}."
        values = {name: self.metadata(prefix + name) for name in self.metadata_names(prefix)}
        divisors = None if self._rope_divisors is None else self._dequantize(self._rope_divisors)
        config, problems = config_from_metadata(self.architecture, values, self._shapes, divisors)
        if problems:
            raise UserError(
                f"{self.where}: metadata not understood: {'; '.join(problems)}. Refused, because "
                "the numbers would be another model's: give its Hugging Face directory instead"
            )
        return config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight's Hugging Face name and shape."""
        return self._shapes

    def dtype(self, name: str) -> np.dtype:
        """float32: weights are dequantized."""
        return np.dtype(np.float32)

    def why_unreadable(self, name: str) -> str | None:
        """Why gguf cannot dequantize the weight, found on its first row; None if it can."""
        tensor = self._tensors[name]
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            return f"is of type {tensor.tensor_type.name}, which gguf cannot dequantize ({error})"
        return None

    def _dequantize(self, tensor: Any) -> np.ndarray:
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self.where}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which "
                f"gguf cannot dequantize ({error}); use the model's Hugging Face directory instead"
            ) from error

    def read(self, name: str) -> np.ndarray:
        """The weight in Hugging Face's layout, dequantized to float32."""
        values = self._dequantize(self._tensors[name]).reshape(self._shapes[name])
        if self._family.norm_offset and name.endswith("norm.weight"):
            return values - np.float32(self._family.norm_offset)
        if self._family.interleaved and ".q_proj." in name:
            return self._undo_interleaving(name, values, "attention.head_count")
        if self._family.interleaved and ".k_proj." in name:
            entry = "attention.head_count_kv"
            same = self.metadata(f"{self.architecture}.{entry}") is None
            return self._undo_interleaving(name, values, entry[: -len("_kv")] if same else entry)
        return values

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The same values; a large embedding or head comes in blocks of rows."""
        tensor = self._tensors[name]
        bounds = row_blocks(self._shapes[name], self.dtype(name).itemsize)
        if len(bounds) == 1 or name.startswith("model.layers."):
            yield self.read(name)
            return
        for begin, end in bounds:
            shape = (end - begin, *self._shapes[name][1:])
            yield gguf.dequantize(tensor.data[begin:end], tensor.tensor_type).reshape(shape)

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of the same values. Of a weight of a layer the whole is dequantized."""
        shape = self._shapes[name]
        if name.startswith("model.layers.") or len(shape) == 1:
            return self.read(name)[part]
        tensor, rows = self._tensors[name], part[0]
        begin, end, _ = rows.indices(shape[0])
        values = gguf.dequantize(tensor.data[begin:end], tensor.tensor_type)
        return values.reshape(end - begin, *shape[1:])[:, *part[1:]]

    def addition(self, name: str) -> None:
        """Nothing is added."""

    def _undo_interleaving(self, name: str, values: np.ndarray, entry: str) -> np.ndarray:
        num_heads = self.metadata(f"{self.architecture}.{entry}")
        if not isinstance(num_heads, int) or num_heads < 1 or len(values) % (2 * num_heads):
            raise UserError(
                f"{self.where}: {name} has {len(values)} rows, which do not divide over "
                f"{num_heads} heads ({self.architecture}.{entry}); download the file again"
            )
        return _undo_pair_interleaving(values, num_heads)


def _undo_pair_interleaving(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [O, ...] from llama.cpp's order (head, pair, half) to Hugging Face's (head, half, pair)."""
    pairs = weight.shape[0] // num_heads // 2
    interleaved = weight.reshape(num_heads, pairs, 2, *weight.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(weight.shape)
