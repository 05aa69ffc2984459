"""GGUF files: config, weights and tokenizer, without torch.

llama.cpp stores q and k of the Llama architecture with the rotary pairs interleaved; reading undoes
that, so the arrays are those of the Hugging Face checkpoint that the file was made from (up to its
quantization).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxgrad.errors import UserError

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{layer}.attn_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "blk.{layer}.ffn_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "blk.{layer}.attn_q.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "blk.{layer}.attn_k.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "blk.{layer}.attn_v.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "blk.{layer}.attn_output.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "blk.{layer}.ffn_gate.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "blk.{layer}.ffn_up.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "blk.{layer}.ffn_down.weight": "model.layers.{layer}.mlp.down_proj.weight",
}


# Metadata of the architecture -> attribute of the config.json; llama.cpp demands the first table's.
REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# All of them are the head size, for a model without partial rotation.
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")


class _BoundedReader(gguf.GGUFReader):
    """A reader that ends at the end of its file: gguf's own reads on, up to 2^64 empty values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"of {len(self.data)} bytes, it ends in what stands at byte {offset}")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > len(self.data):
                raise ValueError(f"a list of {length} values at byte {orig_offs}")
        return super()._get_field_parts(orig_offs, raw_type)


class GgufFile:
    """One GGUF file: metadata by name, and weights under their Hugging Face names.

    Raises:
        UserError: missing, truncated or not a GGUF file; another architecture than llama.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._reader = _BoundedReader(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except Exception as error:  # the reader has no error of its own: it trips over anything
            raise UserError(
                f"{path} is not a complete GGUF file ({error or type(error).__name__}); "
                "download it again"
            ) from error
        self.architecture = self.metadata("general.architecture")
        if self.architecture != "llama":
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; "
                "supported: llama"
            )
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self._shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def metadata(self, name: str) -> Any:
        """The value of a metadata entry, None where there is none."""
        field = self._reader.fields.get(name)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.where}: metadata {name} is damaged ({error}); download it again"
            ) from error

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) > 2:
            template = TENSOR_NAMES.get(".".join(["blk", "{layer}", *parts[2:]]))
            return name if template is None else template.replace("{layer}", parts[1])
        return TENSOR_NAMES.get(name, name)  # an unknown one is named by the loader's check

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this file stands for."""
        prefix = f"{self.architecture}."
        names = [n.removeprefix(prefix) for n in self._reader.fields if n.startswith(prefix)]
        read = REQUIRED | OPTIONAL
        values = {name: self.metadata(prefix + name) for name in names}
        problems = [f"{prefix}{name} is missing" for name in REQUIRED if name not in names]
        problems += [
            f"{prefix}{name} = {str(value)[:60]} is not known"
            for name, value in values.items()
            if name not in read and name not in HEAD_SIZES
        ]
        sizes = {name: values[name] for name in HEAD_SIZES if name in names}
        if len(set(map(str, sizes.values()))) > 1:
            problems.append(f"the head sizes differ: {sizes}")
        if problems:
            raise UserError(
                f"{self.where}: metadata not understood: {'; '.join(problems)}. Refused, because "
                "the numbers would be another model's: give its Hugging Face directory instead"
            )
        config = {read[name]: value for name, value in values.items() if name in read}
        if sizes:
            config["head_dim"] = next(iter(sizes.values()))
        embedding = self._shapes.get("model.embed_tokens.weight")
        if embedding:
            config.setdefault("vocab_size", embedding[0])
        return config | {
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's Hugging Face name and shape."""
        return self._shapes

    def dtype(self, name: str) -> np.dtype:
        """float32: what dequantizing gives."""
        return np.dtype(np.float32)

    def why_unreadable(self, name: str) -> str | None:
        """The quantizations that gguf cannot undo; a weight's first row tells."""
        tensor = self._tensors[name]
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            return f"is of type {tensor.tensor_type.name}, which gguf cannot dequantize ({error})"
        return None

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout, dequantized to float32."""
        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self._shapes[name])
        if name.endswith("q_proj.weight"):
            return _undo_pair_interleaving(values, self.metadata("llama.attention.head_count"))
        if name.endswith("k_proj.weight"):
            heads = self.metadata("llama.attention.head_count")
            kv_heads = self.metadata("llama.attention.head_count_kv") or heads
            return _undo_pair_interleaving(values, kv_heads)
        return values


def _undo_pair_interleaving(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (head, pair, half) of llama.cpp back to (head, half, pair) of Hugging Face."""
    rows, cols = weight_OI.shape
    interleaved = weight_OI.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return interleaved.swapaxes(1, 2).reshape(rows, cols)
