#!/usr/bin/env python3
"""Writes VERSION.json: the config.json of every case, as one version of transformers saves it.

    python -m venv V && V/bin/pip install transformers==4.57.1      PyTorch is not needed
    V/bin/python tests/saved_configs/write.py

`CASES` has the attributes of each config, under the names that all versions take. For each case the file
has "saved", what `save_pretrained` writes, and "more", what all of `to_dict()` has besides. A case that
the version does not know, because the family or the kind of rope is newer, has the reason instead.
"""

import json
import tempfile
import warnings
from pathlib import Path

SHARED = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 131,
}
NORMED = SHARED | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
SIZES = NORMED | {"hidden_act": "silu"}
GEMMA = NORMED | {"hidden_act": "gelu_pytorch_tanh"}
NEWER_GEMMA = NORMED | {"hidden_activation": "gelu_pytorch_tanh"}
NEOX = SHARED | {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}
GPT2 = {
    "vocab_size": 307,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 131,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
LINEAR = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
# Granite and SmolLM3 are newer than the name "type".
NEWER_LINEAR = {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0],
    },
    "original_max_position_embeddings": 32,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 11}
SCALED = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.3,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
}
GEMMA3 = NEWER_GEMMA | {"head_dim": 14, "query_pre_attn_scalar": 10, "sliding_window": 11}
GEMMA3_ROPES = {
    "rope_theta": 9000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.5},
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]

CASES = {
    "llama": ("llama", SIZES),
    "llama_linear_bias": ("llama", SIZES | LINEAR | BIASES),
    "llama_llama3_tied": ("llama", SIZES | LLAMA3 | {"tie_word_embeddings": True}),
    "mistral": ("mistral", SIZES),
    "mistral_window": ("mistral", SIZES | {"sliding_window": 11, "rope_theta": 1e6}),
    "mistral_no_window": ("mistral", SIZES | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES),
    "qwen2_late_window": ("qwen2", SIZES | WINDOW | {"max_window_layers": 2, "rope_theta": 1e6}),
    "qwen3": ("qwen3", SIZES),
    "qwen3_bias_window": (
        "qwen3",
        SIZES | WINDOW | LLAMA3 | {"attention_bias": True, "head_dim": 14, "max_window_layers": 1},
    ),
    "phi3": ("phi3", SIZES),
    "phi3_window_longrope": ("phi3", SIZES | LONGROPE | {"sliding_window": 11}),
    "phi3_partial": ("phi3", SIZES | {"partial_rotary_factor": 0.5, "rope_theta": 700.0}),
    "olmo2": ("olmo2", SIZES),
    "olmo2_linear_bias": ("olmo2", SIZES | LINEAR | {"attention_bias": True}),
    "smollm3": ("smollm3", SIZES),
    "smollm3_window": (
        "smollm3",
        SIZES
        | WINDOW
        | NEWER_LINEAR
        | BIASES
        | {"no_rope_layers": [1, 0, 1], "layer_types": KINDS},
    ),
    "granite": ("granite", SIZES),
    "granite_scaled": ("granite", SIZES | NEWER_LINEAR | BIASES | SCALED),
    "gemma": ("gemma", GEMMA),
    "gemma_linear_untied": (
        "gemma",
        GEMMA | LINEAR | {"head_dim": 14, "tie_word_embeddings": False},
    ),
    "gemma2": ("gemma2", NEWER_GEMMA | {"query_pre_attn_scalar": 256}),
    "gemma2_caps_window": (
        "gemma2",
        NEWER_GEMMA
        | {"sliding_window": 11, "query_pre_attn_scalar": 7, "head_dim": 14, "rope_theta": 800.0}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0, "attention_bias": True},
    ),
    "gemma3_text": ("gemma3_text", NEWER_GEMMA),
    "gemma3_text_pattern": ("gemma3_text", GEMMA3 | GEMMA3_ROPES | {"sliding_window_pattern": 2}),
    "gemma3": ("gemma3", {"text_config": NEWER_GEMMA, "vision_config": VISION}),
    "gemma3_ropes": ("gemma3", {"text_config": GEMMA3 | GEMMA3_ROPES, "vision_config": VISION}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox_partial": (
        "gpt_neox",
        NEOX
        | {"rotary_pct": 0.5, "rotary_emb_base": 700, "use_parallel_residual": False}
        | {"rope_scaling": LINEAR["rope_scaling"], "attention_bias": False, "hidden_act": "relu"},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2_by_depth": (
        "gpt2",
        GPT2
        | {"n_inner": 37, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
        | {"tie_word_embeddings": False, "activation_function": "relu"},
    ),
}


def main() -> None:
    """Write the file of the transformers that is installed."""
    import transformers
    from transformers import CONFIG_MAPPING

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    written = {}
    for case, (model_type, attributes) in CASES.items():
        if model_type not in CONFIG_MAPPING:
            written[case] = "the family is newer"
            continue
        try:
            config = CONFIG_MAPPING[model_type](**json.loads(json.dumps(attributes)))
        except (ValueError, KeyError) as error:
            written[case] = f"refused by this version: {' '.join(str(error).split())[:150]}"
            continue
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            saved = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        full = json.loads(config.to_json_string(use_diff=False))
        more = {k: v for k, v in full.items() if k not in saved or v != saved[k]}
        written[case] = {"saved": saved, "more": more}
    path = Path(__file__).with_name(f"{transformers.__version__}.json")
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(v)}" for case, v in written.items())
    path.write_text(f"{{\n{lines}\n}}\n", "utf-8")
    skipped = {case: why for case, why in written.items() if isinstance(why, str)}
    print(f"{path.name}: {len(written) - len(skipped)} cases; not: {skipped}")


if __name__ == "__main__":
    main()
