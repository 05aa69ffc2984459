"""Llama, and families that differ from it in a few options."""

from typing import Any

from jaxgrad.models.config import AttentionKind
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.common import (
    GATE_UP,
    NORMS_AFTER,
    QKV,
    ROTARY_BUFFERS,
    by_layer,
    llama_keys,
    read_attention_bias,
    read_sizes,
    read_windows,
)
from jaxgrad.models.families.family import Family, Key
from jaxgrad.models.families.rope import read_rope


def _one_kind(
    attributes: Attributes, fields: dict[str, Any], window: int | None = None, **rope: Any
) -> dict[str, Any]:
    kind = AttentionKind(
        read_rope(attributes, max_positions=fields["max_positions"], **rope), window
    )
    return by_layer([kind] * fields["num_layers"])


def _switched_window(attributes: Attributes, default: int | None) -> int | None:
    """The window if use_sliding_window is true, else None."""
    window = attributes.optional_count("sliding_window", default)
    return window if attributes.switch("use_sliding_window", False) else None


def read_llama(attributes: Attributes) -> dict[str, Any]:
    """Llama 2, 3, 3.1, 3.2 and other models of the class LlamaForCausalLM (SmolLM2)."""
    # Slices of products in tensor-parallel training; their sum is the plain product.
    attributes.require("pretraining_tp", 1)
    fields = read_sizes(attributes) | read_attention_bias(attributes)
    fields["mlp_bias"] = attributes.switch("mlp_bias", False)
    return fields | _one_kind(attributes, fields)


def read_mistral(attributes: Attributes) -> dict[str, Any]:
    """Mistral 7B: Llama with a sliding window, since version 0.2 without."""
    fields = read_sizes(attributes, kv_heads=8)
    window = attributes.optional_count("sliding_window", 4096)
    return fields | _one_kind(attributes, fields, window)


def read_qwen2(attributes: Attributes) -> dict[str, Any]:
    """Qwen2 and 2.5: biases on q, k and v; optionally a window in late layers."""
    fields = read_sizes(attributes, kv_heads=32) | {"qkv_bias": True}
    return fields | _qwen_kinds(attributes, fields)


def read_qwen3(attributes: Attributes) -> dict[str, Any]:
    """Qwen3: norms of queries and keys by head."""
    fields = read_sizes(attributes, kv_heads=32, head_size=128) | {"qk_norm": "head"}
    fields |= read_attention_bias(attributes)
    return fields | _qwen_kinds(attributes, fields)


def _qwen_kinds(attributes: Attributes, fields: dict[str, Any]) -> dict[str, Any]:
    num_layers = fields["num_layers"]
    window = _switched_window(attributes, 4096)
    first = attributes.count("max_window_layers", 28, least=0)
    slides = [window is not None and layer >= first for layer in range(num_layers)]
    windows = read_windows(attributes, num_layers, window, slides)
    rope = read_rope(attributes, max_positions=fields["max_positions"])
    return by_layer([AttentionKind(rope, window) for window in windows])


def read_phi3(attributes: Attributes) -> dict[str, Any]:
    """Phi-3, 3.5 and Phi-4 (mini and 14B): fused weights, part of a head rotated, LongRoPE."""
    code = attributes.get("auto_map", None)
    if code is not None and not _is_phi3_code(code):
        attributes.problem(f"auto_map = {code!r} (the model brings code of its own, never run)")
    for name, neutral in PHI3_NEUTRAL.items() if code is not None else ():
        attributes.require(name, neutral)
    fields = read_sizes(attributes)
    window = attributes.optional_count("sliding_window", None)
    return fields | _one_kind(attributes, fields, window, is_partial=True)


# Read by Microsoft's own code only, and at these values in all its published models.
PHI3_NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}


def _is_phi3_code(code: Any) -> bool:
    """Whether an auto_map names Microsoft's own code, whose model is transformers' `phi3`."""
    return isinstance(code, dict) and all(
        key == "AutoTokenizer" or (isinstance(name, str) and name.split(".")[-1].startswith("Phi3"))
        for key, name in code.items()
    )


def read_olmo2(attributes: Attributes) -> dict[str, Any]:
    """OLMo 2: norms after attention and MLP; norms of queries and keys over all heads together."""
    fields = read_sizes(attributes) | read_attention_bias(attributes)
    fields |= {"norm_placement": "after", "qk_norm": "full"}
    return fields | _one_kind(attributes, fields)


def read_smollm3(attributes: Attributes) -> dict[str, Any]:
    """SmolLM3: every fourth layer has no rope."""
    fields = read_sizes(attributes, kv_heads=4, tied=True) | read_attention_bias(attributes)
    fields["mlp_bias"] = attributes.switch("mlp_bias", False)
    num_layers = fields["num_layers"]
    interval = attributes.count("no_rope_layer_interval", 4)
    rotated = attributes.by_layer("no_rope_layers", num_layers, (0, 1))
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    window = _switched_window(attributes, None)
    slides = [window is not None and not has_rope for has_rope in rotated]
    windows = read_windows(attributes, num_layers, window, slides)
    rope = read_rope(attributes, max_positions=fields["max_positions"], theta=2e6)
    kinds = [
        AttentionKind(rope if has_rope else None, window)
        for has_rope, window in zip(rotated, windows, strict=True)
    ]
    return fields | by_layer(kinds)


def read_granite(attributes: Attributes) -> dict[str, Any]:
    """Granite 3 (dense): factors on embedding, attention, residual stream and logits."""
    fields = read_sizes(attributes) | read_attention_bias(attributes)
    fields |= {
        "mlp_bias": attributes.switch("mlp_bias", False),
        "embedding_scale": attributes.number("embedding_multiplier", 1.0),
        "attention_scale": attributes.number("attention_multiplier", 1.0),
        "residual_scale": attributes.number("residual_multiplier", 1.0),
        "logit_scale": 1 / attributes.number("logits_scaling", 1.0),
    }
    return fields | _one_kind(attributes, fields)


def _phi3_keys() -> dict[str, Key]:
    keys = llama_keys()
    for module, block, fused, names in (
        ("attention", "self_attn", "qkv_proj", QKV),
        ("mlp", "mlp", "gate_up_proj", GATE_UP),
    ):
        members = tuple(f"layers.{module}.{name}.weight" for name in names)
        key = Key(f"model.layers.{{layer}}.{block}.{fused}.weight", members)
        keys |= dict.fromkeys(members, key)
    return keys


_LLAMA_KEYS = llama_keys()
LLAMA_LIKE = (
    Family(
        "Llama 2, 3, 3.1, 3.2; SmolLM2",
        "llama",
        "LlamaForCausalLM",
        read_llama,
        _LLAMA_KEYS,
        ROTARY_BUFFERS,
    ),
    Family(
        "Mistral 7B", "mistral", "MistralForCausalLM", read_mistral, _LLAMA_KEYS, ROTARY_BUFFERS
    ),
    Family("Qwen2, Qwen2.5", "qwen2", "Qwen2ForCausalLM", read_qwen2, _LLAMA_KEYS),
    Family("Qwen3", "qwen3", "Qwen3ForCausalLM", read_qwen3, _LLAMA_KEYS),
    Family("Phi-3, Phi-3.5, Phi-4", "phi3", "Phi3ForCausalLM", read_phi3, _phi3_keys()),
    Family("OLMo 2", "olmo2", "Olmo2ForCausalLM", read_olmo2, llama_keys(NORMS_AFTER)),
    Family("SmolLM3", "smollm3", "SmolLM3ForCausalLM", read_smollm3, _LLAMA_KEYS),
    Family("Granite 3", "granite", "GraniteForCausalLM", read_granite, _LLAMA_KEYS),
)
