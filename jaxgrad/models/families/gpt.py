"""GPT-NeoX (Pythia) and GPT-2: LayerNorm, biases, no gate, fused q, k and v weights."""

from typing import Any

from jaxgrad.models.config import AttentionKind
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.common import (
    ACTIVATIONS,
    MOST_LAYERS,
    QKV,
    by_layer,
    check_heads,
    plain_keys,
    read_attention_bias,
)
from jaxgrad.models.families.family import Family, Key
from jaxgrad.models.families.rope import read_rope

GPT_FIELDS: dict[str, Any] = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}


def read_gpt_neox(attributes: Attributes) -> dict[str, Any]:
    """GPT-NeoX: attention and MLP in parallel, a quarter of each head rotated."""
    width = attributes.count("hidden_size")
    num_heads = attributes.count("num_attention_heads")
    check_heads(attributes, width, num_heads)
    fields = GPT_FIELDS | {
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_size": width // num_heads or 1,
        "max_positions": attributes.count("max_position_embeddings"),
        "vocab_size": attributes.count("vocab_size"),
        "mlp_width": attributes.count("intermediate_size"),
        "num_layers": attributes.count("num_hidden_layers", most=MOST_LAYERS),
        "activation": attributes.choose("hidden_act", ACTIVATIONS),
        "norm_epsilon": attributes.number("layer_norm_eps"),
        "tied_embeddings": attributes.switch("tie_word_embeddings", False),
        "parallel_residual": attributes.switch("use_parallel_residual", True),
        **read_attention_bias(attributes, default=True),
    }
    rope = read_rope(
        attributes,
        max_positions=fields["max_positions"],
        theta_name="rotary_emb_base",
        fraction=0.25,
        fraction_name="rotary_pct",
        is_partial=True,
    )
    return fields | by_layer([AttentionKind(rope)] * fields["num_layers"])


def read_gpt2(attributes: Attributes) -> dict[str, Any]:
    """GPT-2: learned positions, no rope."""
    for name in GPT2_IRRELEVANT:
        attributes.get(name, None)
    attributes.require("add_cross_attention", False)
    width = attributes.count("n_embd")
    num_heads = attributes.count("n_head")
    check_heads(attributes, width, num_heads)
    max_positions = attributes.count("n_positions")
    fields = GPT_FIELDS | {
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_size": width // num_heads or 1,
        "max_positions": max_positions,
        "vocab_size": attributes.count("vocab_size"),
        "mlp_width": attributes.count("n_inner", 4 * width),
        "num_layers": attributes.count("n_layer", most=MOST_LAYERS),
        "activation": attributes.choose("activation_function", ACTIVATIONS),
        "norm_epsilon": attributes.number("layer_norm_epsilon"),
        "tied_embeddings": attributes.switch("tie_word_embeddings", True),
        "attention_scale": None if attributes.switch("scale_attn_weights", True) else 1.0,
        "scale_by_depth": attributes.switch("scale_attn_by_inverse_layer_idx", False),
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
    }
    return fields | by_layer([AttentionKind(None)] * fields["num_layers"])


# Heads of other tasks; the order of a scaling, which matters in float16 only.
GPT2_IRRELEVANT = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "summary_last_dropout",
    "reorder_and_upcast_attn",
)


def _gpt_neox_keys() -> dict[str, Key]:
    layer = "gpt_neox.layers.{layer}"
    names = {"embedding": "gpt_neox.embed_in.weight", "lm_head.weight": "embed_out.weight"}
    keys: dict[str, Key] = {}
    for part in ("weight", "bias"):
        names |= {
            f"final_norm.{part}": f"gpt_neox.final_layer_norm.{part}",
            f"layers.attention_norm.{part}": f"{layer}.input_layernorm.{part}",
            f"layers.mlp_norm.{part}": f"{layer}.post_attention_layernorm.{part}",
            f"layers.attention.o.{part}": f"{layer}.attention.dense.{part}",
            f"layers.mlp.up.{part}": f"{layer}.mlp.dense_h_to_4h.{part}",
            f"layers.mlp.down.{part}": f"{layer}.mlp.dense_4h_to_h.{part}",
        }
        members = tuple(f"layers.attention.{name}.{part}" for name in QKV)
        key = Key(f"{layer}.attention.query_key_value.{part}", members, by_head=True)
        keys |= dict.fromkeys(members, key)
    return keys | plain_keys(names)


def _gpt2_keys() -> dict[str, Key]:
    layer = "transformer.h.{layer}"
    names = {
        "embedding": "transformer.wte.weight",
        "position_embedding": "transformer.wpe.weight",
        "lm_head.weight": "lm_head.weight",
    }
    keys: dict[str, Key] = {}
    for part in ("weight", "bias"):
        names |= {
            f"final_norm.{part}": f"transformer.ln_f.{part}",
            f"layers.attention_norm.{part}": f"{layer}.ln_1.{part}",
            f"layers.mlp_norm.{part}": f"{layer}.ln_2.{part}",
        }
        for path, name in (("attention.o", "attn"), ("mlp.up", "mlp"), ("mlp.down", "mlp")):
            stored = "c_fc" if path == "mlp.up" else "c_proj"
            keys[f"layers.{path}.{part}"] = Key(f"{layer}.{name}.{stored}.{part}", transposed=True)
        members = tuple(f"layers.attention.{name}.{part}" for name in QKV)
        key = Key(f"{layer}.attn.c_attn.{part}", members, transposed=True)
        keys |= dict.fromkeys(members, key)
    return keys | plain_keys(names)


GPTS = (
    Family(
        "GPT-NeoX, Pythia",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        read_gpt_neox,
        _gpt_neox_keys(),
        derived=tuple(
            f"gpt_neox.layers.{{layer}}.attention.{name}"
            for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
        ),
        renames=(("lm_head.", "embed_out."),),
    ),
    Family(
        "GPT-2",
        "gpt2",
        "GPT2LMHeadModel",
        read_gpt2,
        _gpt2_keys(),
        derived=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
        # OpenAI's files lack the prefix.
        renames=tuple((name, f"transformer.{name}") for name in ("wte.", "wpe.", "h.", "ln_f.")),
    ),
)
