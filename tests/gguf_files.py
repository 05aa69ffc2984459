"""GGUF files as llama.cpp's converter makes them, from tiny random models and their tokenizers."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_models import BOS, DEFINED, EOS, MARK
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's architecture, what its config has besides the sizes, and the sizes.

    No two sizes are equal. With `blocks`, every matrix has columns that Q8_0 divides into blocks of 32.
    """

    architecture: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    blocks: bool = False

    def config(self) -> Any:
        kind = CONFIGS[self.architecture]
        sizes = {"hidden_size": 56, "intermediate_size": 71, "head_dim": 18}
        if self.blocks:
            sizes = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 24}
        options = dict(self.options)
        if self.architecture == "qwen2":
            del sizes["head_dim"]
        if self.architecture in ("gemma2", "gemma3"):
            options |= {"query_pre_attn_scalar": sizes["head_dim"], "sliding_window": 37}
        return kind(
            vocab_size=263,
            num_hidden_layers=7 if self.architecture == "gemma3" else 3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=257,
            rms_norm_eps=2.0**-17,  # exact in float32, as GGUF stores it
            attn_implementation="eager",
            **sizes,
            **options,
        )


CASES = {
    "llama": Case("llama"),
    "llama_biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": Case(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}}
    ),
    "llama_3": Case("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied": Case("qwen2"),
    "qwen3": Case("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma": Case("gemma"),
    "gemma2": Case("gemma2", {"attn_logit_softcapping": 48.0, "final_logit_softcapping": 28.0}),
    "gemma3": Case("gemma3"),
    "gemma3_scaled": Case("gemma3", {"rope_parameters": GEMMA3_ROPES}),
}


def build_model(config: Any, seed: int = 0) -> Any:
    """The model with random weights.

    Every weight is a multiple of 2^-12 below 4. So one more and one less than a norm's weight are
    exact in float32, and reading a Gemma file must give it back to the bit.
    """
    model = AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=random).clamp(-3.9, 3.9)
            weight.copy_((0.3 * noise * 4096).round() / 4096)
    return model


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerFast | None = None,
    pre: str = "smollm",
    quantization: gguf.GGMLQuantizationType = F32,
) -> Path:
    """What llama.cpp's converter makes of a model: its names, its changes to weights, its metadata.

    Matrices are stored in `quantization`, vectors in float32.
    """
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("quantize.imatrix.file", "imatrix.dat")
    _add_sizes(writer, architecture, config)
    divisors = _add_rope(writer, architecture, config)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    if tokenizer is not None:
        add_byte_level_tokenizer(writer, tokenizer, pre)
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), 99
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        for projection, num_heads in heads.items():
            if architecture == "llama" and f".{projection}." in name:
                values = interleave_pairs(values, num_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 2 and quantization != F32:
            values = gguf.quants.quantize(values, quantization)
            writer.add_tensor(gguf_name, values, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    return finish(writer)


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def interleave_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter, for weights and biases."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _add_sizes(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rope(writer: gguf.GGUFWriter, architecture: str, config: Any) -> np.ndarray | None:
    """The rope's metadata; returns the divisors of the frequencies that Llama 3.1's files hold."""
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if architecture not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return rope_divisors(config) if rope["rope_type"] == "llama3" else None


def rope_divisors(config: Any) -> np.ndarray:
    """What transformers divides the frequencies of Llama 3.1's rope by, in float32."""
    rope = config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    divisors = (rope["rope_theta"] ** -exponents / scaled).numpy()
    for exact in (1.0, rope["factor"]):  # the converter writes these two as they are
        divisors[np.isclose(divisors, exact, rtol=1e-6)] = exact
    return divisors


def add_byte_level_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str
) -> None:
    """A tokenizer of `tiny_models.build_tokenizer` with a byte-level BPE."""
    vocab = tokenizer.get_vocab()
    names = sorted(vocab, key=vocab.get)
    kinds = dict.fromkeys((BOS, EOS, MARK), gguf.TokenType.CONTROL)
    kinds |= {DEFINED: gguf.TokenType.USER_DEFINED}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    add_tokens(writer, names, [kinds.get(name, gguf.TokenType.NORMAL) for name in names])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocab[BOS])
    writer.add_eos_token_id(vocab[EOS])
    writer.add_chat_template(tokenizer.chat_template)


def add_tokens(
    writer: gguf.GGUFWriter, tokens: Iterable[str], types: Iterable[gguf.TokenType]
) -> None:
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
