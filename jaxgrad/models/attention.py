"""Attention without weights: which tokens are seen, how far they are turned, how they are mixed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.dtypes import at_least_float32
from jaxgrad.models.config import DecoderConfig, Rope


class AttentionTables(NamedTuple):
    """What one layer's attention needs besides its weights.

    Attributes:
        cos_sin_2TR: cosines and sines of the rotated pairs, None where nothing is rotated.
        window: how many tokens a token sees, itself included; None for all before it.
        scale: of the products of queries and keys.
    """

    cos_sin_2TR: jax.Array | None
    window: jax.Array | int | None
    scale: jax.Array | float


def layer_tables(
    config: DecoderConfig, num_padded: int, num_tokens: jax.Array | None, dtype: np.dtype
) -> tuple[Callable[[dict[str, jax.Array]], AttentionTables], dict[str, jax.Array]]:
    """A function from a layer's place to its tables, and the places of all layers, stacked.

    A place holds no more than what differs between layers, so a decoder whose layers are all alike
    scans over nothing but its weights.

    Args:
        config: the decoder.
        num_padded: T.
        num_tokens: tokens of the sequence without its padding, int32 scalar; None for T.
        dtype: of angles and scores, at least float32.
    """
    kinds = config.kinds
    angles_k = [_cos_sin(kind.rope, config, num_padded, num_tokens, dtype) for kind in kinds]
    turning = [table for table in angles_k if table is not None]
    if turning:
        # A layer without rope among others with one: angles of zero turn nothing, to the last bit.
        still = jnp.stack([jnp.ones_like(turning[0][0]), jnp.zeros_like(turning[0][1])])
        stacked = jnp.stack([still if table is None else table for table in angles_k])
    windows = [num_padded if kind.window is None else kind.window for kind in kinds]
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    places = {}
    if len(kinds) > 1:
        places["kind"] = jnp.asarray(np.asarray(config.layer_kinds, np.int32))
    if config.scale_by_depth:
        depth = np.arange(1, config.num_layers + 1)
        places["scale"] = jnp.asarray((scale / depth).astype(dtype))

    def tables(place: dict[str, jax.Array]) -> AttentionTables:
        layer_scale = place.get("scale", scale)
        if "kind" not in place:
            return AttentionTables(angles_k[0], kinds[0].window, layer_scale)
        kind = place["kind"]
        cos_sin_2TR = stacked[kind] if turning else None
        window = jnp.asarray(np.asarray(windows, np.int32))[kind]
        return AttentionTables(cos_sin_2TR, window, layer_scale)

    return tables, places


def _cos_sin(
    rope: Rope | None,
    config: DecoderConfig,
    num_padded: int,
    num_tokens: jax.Array | None,
    dtype: np.dtype,
) -> jax.Array | None:
    if rope is None:
        return None
    size = config.head_size
    short = jnp.asarray(rope.cos_sin(num_padded, size, dtype))
    if not rope.depends_on_length(num_padded):
        return short
    long = jnp.asarray(rope.cos_sin(num_padded, size, dtype, is_long=True))
    if num_tokens is None:
        return long
    return jnp.where(num_tokens > rope.original_length, long, short)


def rotate(x_TNH: jax.Array, cos_sin_2TR: jax.Array) -> jax.Array:
    """Turn each pair (x[r], x[r + R]) by its position's angle, in the dtype of the angles.

    R pairs are the first 2 R entries of a head; the entries beyond are left as they are.
    """
    cos, sin = (part[:, None, :] for part in cos_sin_2TR)
    num_pairs = cos.shape[-1]
    first, second, rest = jnp.split(x_TNH.astype(cos.dtype), (num_pairs, 2 * num_pairs), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest], axis=-1).astype(x_TNH.dtype)


def causal_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    tables: AttentionTables,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention over the tokens up to each position, [T, N, H]."""

    # Rematerialised: the scores are T x T a head and layer, which at T = 1024 is most of the memory
    # of a forward pass, and recomputing them costs a few percent.
    @jax.checkpoint
    def attend(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
        num_tokens, num_heads, head_size = q_TNH.shape
        num_kv_heads = k_TKH.shape[1]
        q_TKGH = q_TNH.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
        scores_KGTS = jnp.einsum("tkgh,skh->kgts", q_TKGH, k_TKH)
        scores_KGTS = scores_KGTS.astype(at_least_float32(q_TNH.dtype)) * tables.scale
        if softcap is not None:
            scores_KGTS = softcap * jnp.tanh(scores_KGTS / softcap)
        visible_TS = _visible(num_tokens, tables.window)
        scores_KGTS = jnp.where(visible_TS[None, None], scores_KGTS, -jnp.inf)
        weights_KGTS = jax.nn.softmax(scores_KGTS, axis=-1).astype(q_TNH.dtype)
        return jnp.einsum("kgts,skh->tkgh", weights_KGTS, v_TKH).reshape(q_TNH.shape)

    return attend(q_TNH, k_TKH, v_TKH)


def _visible(num_tokens: int, window: jax.Array | int | None) -> np.ndarray | jax.Array:
    """Which positions S each position T sees, bool [T, S]."""
    position = np.arange(num_tokens, dtype=np.int32)
    distance_TS = position[:, None] - position[None, :]
    if window is None:
        return distance_TS >= 0
    return (distance_TS >= 0) & (distance_TS < window)
