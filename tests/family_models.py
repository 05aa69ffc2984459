"""Tiny random models of every family, made by transformers: head layouts, tying, ropes, windows.

No two axes of a model are equal where its family allows that, so that a swapped axis cannot pass.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import ROPES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 11  # far below the longest example's tokens
SHORT_LENGTH = 32  # longrope's change of factors, between the lengths of the two examples
MAX_POSITIONS = 131

LLAMA3 = ROPES["llama3"]
LINEAR = ROPES["linear"]


@dataclasses.dataclass(frozen=True)
class FamilyModel:
    """A model's type, its head layout, and the attributes that differ from `SIZES`."""

    model_type: str
    num_kv_heads: int
    attributes: dict[str, Any]


SIZES = {
    "hidden_size": 52,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 14,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# 4 heads of 13 entries, of which the first 6 or 12 are rotated.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 900.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.4],
    "long_factor": [1.5, 2.5, 4.0],
}
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 2.5},
}
GEMMA3_LLAMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    "full_attention": LLAMA3,
}
ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]


def _model(model_type: str, num_kv_heads: int, **attributes: Any) -> FamilyModel:
    return FamilyModel(model_type, num_kv_heads, attributes)


MODELS = {
    "llama_gqa_bias": _model(
        "llama", 2, attention_bias=True, mlp_bias=True
    ),  # more in `test_parity`
    "mistral_mha_window": _model("mistral", 4, tie_word_embeddings=True, sliding_window=WINDOW),
    "mistral_gqa": _model("mistral", 2, sliding_window=None, rope_parameters=LLAMA3),
    "mistral_mqa_window": _model("mistral", 1, sliding_window=WINDOW, rope_parameters=LINEAR),
    "qwen2_mha": _model("qwen2", 4, head_dim=None, hidden_size=56),
    "qwen2_gqa_tied": _model("qwen2", 2, tie_word_embeddings=True, rope_parameters=LINEAR),
    "qwen2_mqa_late_window": _model(
        "qwen2", 1, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3_mha": _model("qwen3", 4, rope_parameters=LINEAR),
    "qwen3_gqa_tied": _model("qwen3", 2, tie_word_embeddings=True),
    "qwen3_mqa_bias_window": _model(
        "qwen3",
        1,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        rope_parameters=LLAMA3,
    ),
    "gemma_mha": _model("gemma", 4, tie_word_embeddings=False, rope_parameters=LINEAR),
    "gemma_gqa_gelu": _model("gemma", 2, hidden_act="gelu"),
    "gemma_mqa": _model("gemma", 1, rope_parameters=LLAMA3),
    "gemma2_mha": _model(
        "gemma2", 4, sliding_window=WINDOW, query_pre_attn_scalar=10, tie_word_embeddings=False
    ),
    "gemma2_gqa_tight_caps": _model(
        "gemma2",
        2,
        sliding_window=WINDOW,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        rope_parameters=LINEAR,
    ),
    "gemma2_mqa_no_caps": _model(
        "gemma2",
        1,
        sliding_window=WINDOW,
        query_pre_attn_scalar=14,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=ALTERNATING,
    ),
    "gemma3_mha": _model(
        "gemma3_text",
        4,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        layer_types=ALTERNATING,
        rope_parameters=GEMMA3_ROPES,
        tie_word_embeddings=False,
    ),
    "gemma3_gqa_pattern": _model(
        "gemma3_text", 2, sliding_window=WINDOW, num_hidden_layers=7, final_logit_softcapping=9.0
    ),
    "gemma3_mqa": _model(
        "gemma3_text",
        1,
        sliding_window=WINDOW,
        query_pre_attn_scalar=14,
        layer_types=ALTERNATING[1:] + ALTERNATING[:1],
        rope_parameters=GEMMA3_LLAMA3,
    ),
    "gemma3_multimodal": _model(
        "gemma3",
        2,
        sliding_window=WINDOW,
        query_pre_attn_scalar=10,
        layer_types=ALTERNATING,
        rope_parameters=GEMMA3_ROPES,
    ),
    "phi3_mha_window": _model("phi3", 4, head_dim=None, hidden_size=56, sliding_window=WINDOW),
    "phi3_gqa_tied_longrope": _model(
        "phi3",
        2,
        head_dim=None,
        tie_word_embeddings=True,
        original_max_position_embeddings=SHORT_LENGTH,
        rope_parameters=LONGROPE,
    ),
    "phi3_mqa_partial": _model(
        "phi3",
        1,
        head_dim=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.75,
        },
        hidden_size=64,
    ),
    "olmo2_mha": _model("olmo2", 4),
    "olmo2_gqa_tied": _model("olmo2", 2, tie_word_embeddings=True, rope_parameters=LINEAR),
    "olmo2_mqa_bias": _model("olmo2", 1, attention_bias=True, rope_parameters=LLAMA3),
    "smollm3_mha": _model("smollm3", 4, tie_word_embeddings=False, no_rope_layer_interval=2),
    "smollm3_gqa_tied": _model(
        "smollm3", 2, no_rope_layers=[0, 1, 1], attention_bias=True, rope_parameters=LINEAR
    ),
    "smollm3_mqa_window": _model(
        "smollm3",
        1,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        mlp_bias=True,
        rope_parameters=LLAMA3,
    ),
    "granite_mha": _model("granite", 4, attention_multiplier=0.3, rope_parameters=LINEAR),
    "granite_gqa_tied": _model(
        "granite",
        2,
        tie_word_embeddings=True,
        embedding_multiplier=1.7,
        logits_scaling=1.3,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
    "granite_mqa_bias": _model(
        "granite",
        1,
        attention_bias=True,
        mlp_bias=True,
        residual_multiplier=0.7,
        attention_multiplier=0.4,
        rope_parameters=LLAMA3,
    ),
    "gpt_neox_parallel": _model("gpt_neox", 4, hidden_size=64),
    "gpt_neox_tied_sequential": _model(
        "gpt_neox",
        4,
        hidden_size=48,
        tie_word_embeddings=True,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        rope_parameters={**LINEAR, "partial_rotary_factor": 0.5},
    ),
    "gpt2": _model("gpt2", 4),
    "gpt2_untied_by_depth": _model(
        "gpt2",
        4,
        tie_word_embeddings=False,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        n_inner=37,
        activation_function="relu",
    ),
    "gpt2_unscaled": _model("gpt2", 4, scale_attn_weights=False),
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# Small images, and as small a tower as there can be.
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def build_config(model: FamilyModel, vocab_size: int) -> Any:
    """The transformers config."""
    values = SIZES | {"num_key_value_heads": model.num_kv_heads} | model.attributes
    values = {
        name: value for name, value in values.items() if value is not None or name != "head_dim"
    }
    values["vocab_size"] = vocab_size
    if model.model_type in ("gpt_neox", "gpt2"):
        del values["num_key_value_heads"], values["head_dim"]
    if model.model_type == "gpt2":
        for name, ours in GPT2_NAMES.items():
            values[ours] = values.pop(name)
        del values["intermediate_size"]
    if model.model_type == "gemma3":
        return CONFIG_MAPPING["gemma3"](text_config=values, vision_config=VISION)
    return CONFIG_MAPPING[model.model_type](**values)


def build_model(model: FamilyModel, vocab_size: int, seed: int = 0) -> Any:
    """The model with random weights whose scale keeps every activation near one."""
    config = build_config(model, vocab_size)
    built = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    scale = config.get_text_config().hidden_size ** -0.5
    random = torch.Generator().manual_seed(seed)
    is_gemma = model.model_type.startswith("gemma")
    with torch.no_grad():
        for name, weight in built.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                is_scale = name.endswith("weight")
                weight.copy_(0.2 * noise + (1.0 if is_scale and not is_gemma else 0.0))
            elif "embed" in name or "wte" in name or "wpe" in name:
                # Gemma multiplies by the square root of the width.
                weight.copy_(noise * (scale if is_gemma else 0.5))
            else:
                fan_in = weight.shape[0] if model.model_type == "gpt2" else weight.shape[-1]
                weight.copy_(1.5 * noise / fan_in**0.5)
    return built


def save_model(model: FamilyModel, directory: Path, seed: int = 0) -> Path:
    """The model and a tokenizer as a Hugging Face directory."""
    tokenizer = tiny_models.build_tokenizer()
    build_model(model, len(tokenizer), seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
