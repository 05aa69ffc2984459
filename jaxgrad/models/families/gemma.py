"""Gemma 1, 2 and 3: norms scale by 1 + w, scaled embeddings, gated tanh-GELU, tied heads."""

import math
from typing import Any

from jaxgrad.models.config import AttentionKind
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.common import (
    NORMS_BOTH,
    ROTARY_BUFFERS,
    by_layer,
    llama_keys,
    read_attention_bias,
    read_sizes,
    read_windows,
)
from jaxgrad.models.families.family import Family
from jaxgrad.models.families.reads import rules_for
from jaxgrad.models.families.rope import read_local_and_global_rope, read_rope

# transformers' defaults that multimodal checkpoints leave out of their text_config.
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}


def _read_shared(attributes: Attributes, kv_heads: int, activation: str) -> dict[str, Any]:
    fields = read_sizes(
        attributes, kv_heads=kv_heads, head_size=256, activation=activation, tied=True
    )
    fields |= {"norm": "rms_plus_one", "embedding_scale": math.sqrt(fields["width"])}
    return fields | read_attention_bias(attributes)


def read_gemma(attributes: Attributes) -> dict[str, Any]:
    """Gemma 1. Its files say "gelu" and mean the tanh form; transformers reads them so."""
    fields = _read_shared(attributes, 16, "hidden_act")
    if fields["activation"] == "gelu":
        fields["activation"] = "gelu_tanh"
    if attributes.get("hidden_activation", None) is not None:
        attributes.require("hidden_activation", "gelu_pytorch_tanh")
    kind = AttentionKind(read_rope(attributes, max_positions=fields["max_positions"]))
    return fields | by_layer([kind] * fields["num_layers"])


def read_gemma2(attributes: Attributes) -> dict[str, Any]:
    """Gemma 2: norms before and after, soft caps, a window in every other layer, query scale."""
    fields = _read_shared(attributes, 4, "hidden_activation")
    fields |= _read_caps(attributes, 50.0, 30.0)
    num_layers = fields["num_layers"]
    window = attributes.optional_count("sliding_window", 4096)
    slides = [layer % 2 == 0 for layer in range(num_layers)]
    windows = read_windows(attributes, num_layers, window, slides)
    rope = read_rope(attributes, max_positions=fields["max_positions"])
    return fields | by_layer([AttentionKind(rope, window) for window in windows])


def read_gemma3_text(attributes: Attributes) -> dict[str, Any]:
    """Gemma 3's text decoder: norms of queries and keys by head, five windowed layers per full one."""
    fields = _read_shared(attributes, 4, "hidden_activation")
    fields |= _read_caps(attributes, None, None) | {"qk_norm": "head"}
    num_layers = fields["num_layers"]
    window = attributes.optional_count("sliding_window", 4096)
    interval = attributes.count("_sliding_window_pattern", 6)
    if attributes.has("sliding_window_pattern"):
        interval = attributes.count("sliding_window_pattern")
    slides = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    windows = read_windows(attributes, num_layers, window, slides)
    local, whole = read_local_and_global_rope(
        attributes,
        max_positions=fields["max_positions"],
        local_theta=10_000.0,
        global_theta=1_000_000.0,
    )
    kinds = [AttentionKind(whole if window is None else local, window) for window in windows]
    return fields | by_layer(kinds)


def _read_caps(
    attributes: Attributes, attention: float | None, logits: float | None
) -> dict[str, Any]:
    return {
        "norm_placement": "both",
        "attention_softcap": attributes.optional_number("attn_logit_softcapping", attention),
        "logit_softcap": attributes.optional_number("final_logit_softcapping", logits),
        "attention_scale": attributes.number("query_pre_attn_scalar", 256) ** -0.5,
    }


def read_gemma3(attributes: Attributes) -> dict[str, Any]:
    """The text decoder of a multimodal Gemma 3."""
    outer = ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    for name in (*outer, "vision_config"):
        attributes.get(name, None)
    text = attributes.part(
        "text_config", rules_for("gemma3_text", attributes.get("transformers_version", None))
    )
    text.set_defaults(GEMMA3_DEFAULTS)
    fields = read_gemma3_text(text)
    attributes.include(text)
    # Since transformers 5 the outer one counts, before it the text's.
    tied, outer_tied = fields["tied_embeddings"], attributes.switch("tie_word_embeddings", True)
    if tied != outer_tied:
        attributes.contradiction(
            {"tie_word_embeddings": outer_tied, "text_config.tie_word_embeddings": tied}
        )
    return fields


_BOTH = llama_keys(NORMS_BOTH)
GEMMAS = (
    Family("Gemma 1", "gemma", "GemmaForCausalLM", read_gemma, llama_keys(), ROTARY_BUFFERS),
    Family("Gemma 2", "gemma2", "Gemma2ForCausalLM", read_gemma2, _BOTH, ROTARY_BUFFERS),
    Family("Gemma 3 (text)", "gemma3_text", "Gemma3ForCausalLM", read_gemma3_text, _BOTH),
    Family(
        "Gemma 3 (multimodal, its text decoder)",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        read_gemma3,
        _BOTH,
        # Names in older files, and in memory of transformers 5.
        renames=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
        ignored=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    ),
)
