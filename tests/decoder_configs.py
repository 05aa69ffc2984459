"""Tiny decoder configs; no PyTorch, unlike `tiny_models`."""

from typing import Any

from jaxgrad.models import AttentionKind, DecoderConfig, Rope


def tiny_config(**changes: Any) -> DecoderConfig:
    """A Llama decoder of three layers with these changes; no two of its own axes are equal.

    Without `layer_kinds` every layer is of the first kind.
    """
    fields = {
        "vocab_size": 31,
        "width": 20,
        "mlp_width": 23,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "max_positions": 67,
        "activation": "silu",
        "norm_epsilon": 1e-5,
        "kinds": (AttentionKind(Rope(500.0)),),
        "tied_embeddings": False,
    } | changes
    return DecoderConfig(**({"layer_kinds": (0,) * fields["num_layers"]} | fields))
