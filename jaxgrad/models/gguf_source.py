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


class GgufFile:
    """One GGUF file: metadata by name, and weights under their Hugging Face names.

    Raises:
        UserError: missing, truncated or not a GGUF file; another architecture than llama; a metadata
            entry of the architecture that is not understood; a tensor that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        # The reader has no error of its own: a cut or foreign file shows as whatever its memory map trips
        # over.
        except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is not a complete GGUF file ({error})") from error
        self.architecture = self.metadata("general.architecture")
        if self.architecture != "llama":
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: llama"
            )
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self._shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def metadata(self, name: str) -> Any:
        """The value of a metadata entry, None where there is none."""
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) > 2:
            template = TENSOR_NAMES.get(".".join(["blk", "{layer}", *parts[2:]]))
            return name if template is None else template.replace("{layer}", parts[1])
        return TENSOR_NAMES.get(name, name)  # an unknown one is named by the loader's check

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this file stands for."""
        read = {
            "context_length": "max_position_embeddings",
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "block_count": "num_hidden_layers",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_key_value_heads",
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "rope.dimension_count": "head_dim",
            "vocab_size": "vocab_size",
        }
        prefix = f"{self.architecture}."
        names = [n.removeprefix(prefix) for n in self._reader.fields if n.startswith(prefix)]
        # Key and value sizes restate head_dim; they are checked against it below.
        restated = {"attention.key_length", "attention.value_length"}
        unknown = [n for n in names if n not in read and n not in restated | {"rope.freq_base"}]
        if unknown:
            raise UserError(
                f"{self.where}: metadata not understood: "
                + "; ".join(f"{prefix}{n} = {self.metadata(prefix + n)!r}" for n in unknown)
            )
        config = {hf: self.metadata(prefix + ours) for ours, hf in read.items() if ours in names}
        for name in restated & set(names):
            if self.metadata(prefix + name) != config.get("head_dim"):
                raise UserError(f"{self.where}: {prefix}{name} differs from the rope's dimension")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if "vocab_size" not in config and embedding is not None:
            config["vocab_size"] = int(embedding.shape[1])
        return config | {
            "model_type": "llama",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.metadata(prefix + "rope.freq_base") or 10000.0,
            },
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's Hugging Face name and shape."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantized to float32 (or in the file's own float), in Hugging Face's layout."""
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self.where}: {name} is quantized as {tensor.tensor_type.name}, "
                f"which cannot be read ({error})"
            ) from error
        values = values.reshape(self._shapes[name])
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
