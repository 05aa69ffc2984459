"""What the readers share: sizes and names under which nearly all families have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrad.models.config import Activation, AttentionKind
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.family import Key

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
MOST_LAYERS = 10_000  # a config that claims more is damaged, and would be unrolled into lists
SLIDING, FULL = "sliding_attention", "full_attention"

# Buffers of old checkpoints: the rope's frequencies follow from the config.
ROTARY_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def read_sizes(
    attributes: Attributes,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    activation: str = "hidden_act",
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of `DecoderConfig` that all Llama-like families have under the same names.

    Args:
        attributes: of the config.
        kv_heads: transformers' default for the family; None for as many as query heads.
        head_size: its default; None for the width over the heads.
        activation: the attribute's name.
        tied: the default of tying the head to the embedding.
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
    """The fields for `attention_bias`, which is one switch for q, k, v and o."""
    bias = attributes.switch("attention_bias", default)
    return {"qkv_bias": bias, "output_bias": bias}


def check_heads(attributes: Attributes, width: int, num_heads: int) -> None:
    """Note it where the heads do not share the width evenly."""
    if attributes.sound and width % num_heads:
        attributes.problem(f"the width {width} does not divide over {num_heads} heads")


def read_windows(
    attributes: Attributes, num_layers: int, window: int | None, slides: Sequence[bool]
) -> list[int | None]:
    """Each layer's window.

    Args:
        attributes: of the config; `layer_types`, where it stands, says which layers slide.
        num_layers: how many there are.
        window: of those that slide.
        slides: which do where `layer_types` does not stand.
    """
    types = attributes.by_layer("layer_types", num_layers, (FULL, SLIDING))
    if types is not None:
        slides = [kind == SLIDING for kind in types]
    if window is None and any(slides):
        attributes.problem("some layers slide (layer_types), but sliding_window is not given")
    return [window if sliding else None for sliding in slides]


def by_layer(kinds: Sequence[AttentionKind]) -> dict[str, Any]:
    """The fields `kinds` and `layer_kinds` for a kind of attention a layer."""
    distinct = tuple(dict.fromkeys(kinds))
    places = {kind: place for place, kind in enumerate(distinct)}
    return {"kinds": distinct, "layer_kinds": tuple(places[kind] for kind in kinds)}


def plain_keys(names: Mapping[str, str]) -> dict[str, Key]:
    """A key for each parameter that has a weight to itself."""
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
    """The key table of the families that name their weights as Llama does.

    Weights that a config of the family has no use for (biases, norms of q and k, a head that is
    tied) stand in the table as well: what is looked up follows from the decoder.
    """
    names = {
        "embedding": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "layers.attention.q_norm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
        "layers.attention.k_norm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
        **norms,
    }
    blocks = (
        ("attention", "self_attn", ("q", "k", "v", "o")),
        ("mlp", "mlp", ("gate", "up", "down")),
    )
    for module, block, projections in blocks:
        for name in projections:
            for part in ("weight", "bias"):
                path = f"layers.{module}.{name}.{part}"
                names[path] = f"model.layers.{{layer}}.{block}.{name}_proj.{part}"
    return plain_keys(names)
