"""What the config readers share: attributes and weight names that most families have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrad.models.config import Activation, AttentionKind
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.family import Key
from jaxgrad.projections import ATTENTION, MLP

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
QKV, GATE_UP = ATTENTION[:3], MLP[:2]  # fused in the files of some families
MOST_LAYERS = 10_000  # more are a damaged config, which would make lists of any length
SLIDING, FULL = "sliding_attention", "full_attention"

# Buffers in old checkpoints. The config gives the rope's frequencies.
ROTARY_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def read_sizes(
    attributes: Attributes,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    activation: str = "hidden_act",
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of `DecoderConfig` whose attributes have the same names in all Llama-like families.

    Args:
        attributes: of the config.
        kv_heads: transformers' default for the family; None for the number of query heads.
        head_size: transformers' default; None for width / heads.
        activation: name of the activation's attribute.
        tied: transformers' default of tie_word_embeddings.
    """
    width = attributes.count("hidden_size")
    num_heads = attributes.count("num_attention_heads")
    fields = {
        "width": width,
        "num_heads": num_heads,
        "max_positions": attributes.count("max_position_embeddings"),
        "vocab_size": attributes.count("vocab_size"),
        "mlp_width": attributes.count("intermediate_size"),
        "num_layers": attributes.count("num_hidden_layers", most=MOST_LAYERS),
        "num_kv_heads": attributes.count("num_key_value_heads", kv_heads or num_heads),
        "activation": attributes.choose(activation, ACTIVATIONS),
        "norm_epsilon": attributes.number("rms_norm_eps"),
        "tied_embeddings": attributes.switch("tie_word_embeddings", tied),
    }
    fields["head_size"] = attributes.count("head_dim", head_size or width // num_heads or 1)
    if head_size is None and attributes.get("head_dim", None) is None:
        check_heads(attributes, width, num_heads)
    return fields


def read_attention_bias(attributes: Attributes, default: bool = False) -> dict[str, bool]:
    """The fields that `attention_bias` sets: one switch for q, k, v and o."""
    bias = attributes.switch("attention_bias", default)
    return {"qkv_bias": bias, "output_bias": bias}


def check_heads(attributes: Attributes, width: int, num_heads: int) -> None:
    """Note a problem if the width does not divide by the heads."""
    if attributes.sound and width % num_heads:
        attributes.problem(f"the width {width} does not divide over {num_heads} heads")


def read_windows(
    attributes: Attributes, num_layers: int, window: int | None, slides: Sequence[bool]
) -> list[int | None]:
    """Each layer's window; None for full attention.

    Args:
        attributes: of the config. Its `layer_types`, if there, says which layers have a window.
        num_layers: L.
        window: the window's size.
        slides: which layers have one if there is no `layer_types`.
    """
    types = attributes.by_layer("layer_types", num_layers, (FULL, SLIDING))
    if types is not None:
        slides = [kind == SLIDING for kind in types]
    if window is None and any(slides):
        attributes.problem("some layers slide (layer_types), but sliding_window is not given")
    return [window if sliding else None for sliding in slides]


def by_layer(kinds: Sequence[AttentionKind]) -> dict[str, Any]:
    """The fields `kinds` and `layer_kinds`, from one kind of attention per layer."""
    distinct = tuple(dict.fromkeys(kinds))
    index_of = {kind: index for index, kind in enumerate(distinct)}
    return {"kinds": distinct, "layer_kinds": tuple(index_of[kind] for kind in kinds)}


def plain_keys(names: Mapping[str, str]) -> dict[str, Key]:
    """Keys of parameters that are not fused with others, from their weights' names."""
    return {path: Key(name) for path, name in names.items()}


NORMS_BEFORE = {
    "layers.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
}
NORMS_AFTER = {
    "layers.attention_post_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.mlp_post_norm.weight": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
NORMS_BOTH = NORMS_AFTER | {
    "layers.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{layer}.pre_feedforward_layernorm.weight",
}


def llama_keys(norms: Mapping[str, str] = NORMS_BEFORE) -> dict[str, Key]:
    """The key table of families that name their weights as Llama does.

    It also lists weights that a config may not have (biases, norms of q and k, an untied head). Only those
    of the decoder's parameters are looked up.
    """
    names = {
        "embedding": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "layers.attention.q_norm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
        "layers.attention.k_norm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
        **norms,
    }
    for module, block, projections in (("attention", "self_attn", ATTENTION), ("mlp", "mlp", MLP)):
        for name in projections:
            for part in ("weight", "bias"):
                path = f"layers.{module}.{name}.{part}"
                names[path] = f"model.layers.{{layer}}.{block}.{name}_proj.{part}"
    return plain_keys(names)
