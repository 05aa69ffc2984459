"""Attention without its weights: causal mask and window, rotary embedding, weighted sum of values."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.dtypes import at_least_float32
from jaxgrad.models.config import DecoderConfig, Rope

# With n blocks of queries, (n + 1) / 2n of the square of scores is computed. More blocks mean more to
# compile and smaller matrix products.
MAX_BLOCKS = 4
MIN_BLOCK = 96


class AttentionTables(NamedTuple):
    """What one layer's attention needs besides its weights.

    Attributes:
        cos_sin_2TR: cosines and sines of R rotated pairs; None if nothing is rotated.
        window: how many tokens a token attends to, itself included; None for no limit.
        scale: factor on the products of queries and keys.
    """

    cos_sin_2TR: jax.Array | None
    window: jax.Array | int | None
    scale: jax.Array | float


def layer_tables(
    config: DecoderConfig, num_padded: int, num_tokens: jax.Array | None, dtype: np.dtype
) -> tuple[Callable[[dict[str, jax.Array]], AttentionTables], dict[str, jax.Array]]:
    """A function that makes a layer's tables from its traits, and the traits of all layers.

    Args:
        config: the decoder.
        num_padded: T.
        num_tokens: tokens of the sequence without padding, int32 scalar; None for T.
        dtype: of angles and scores, at least float32.

    Returns:
        traits of one layer -> its `AttentionTables`.
        The traits, each stacked over layers [L]: "kind", the index in `config.kinds`, and "scale".
        A trait is left out if all layers have the same, so most decoders scan over weights alone.
    """
    kinds = config.kinds
    angles = [_cos_sin(kind.rope, config, num_padded, num_tokens, dtype) for kind in kinds]
    rotating = [table for table in angles if table is not None]
    if rotating:
        # Kinds without rope get angles of zero, which change no bit.
        zero = jnp.stack([jnp.ones_like(rotating[0][0]), jnp.zeros_like(rotating[0][1])])
        stacked = jnp.stack([zero if table is None else table for table in angles])
    windows = [num_padded if kind.window is None else kind.window for kind in kinds]
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    traits_L = {}
    if len(kinds) > 1:
        traits_L["kind"] = jnp.asarray(np.asarray(config.layer_kinds, np.int32))
    if config.scale_by_depth:
        depth = np.arange(1, config.num_layers + 1)
        traits_L["scale"] = jnp.asarray((scale / depth).astype(dtype))

    def tables(traits: dict[str, jax.Array]) -> AttentionTables:
        layer_scale = traits.get("scale", scale)
        if "kind" not in traits:
            return AttentionTables(angles[0], kinds[0].window, layer_scale)
        kind = traits["kind"]
        cos_sin_2TR = stacked[kind] if rotating else None
        window = jnp.asarray(np.asarray(windows, np.int32))[kind]
        return AttentionTables(cos_sin_2TR, window, layer_scale)

    return tables, traits_L


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
    """Rotate each pair (x[r], x[r + R]) by its position's angle, in the dtype of the angles.

    The R pairs are the first 2 R entries of a head; the others are not rotated.
    """
    cos, sin = (part[:, None, :] for part in cos_sin_2TR)
    num_pairs = cos.shape[-1]
    first, second, rest = jnp.split(x_TNH.astype(cos.dtype), (num_pairs, 2 * num_pairs), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x_TNH.dtype)


def causal_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    tables: AttentionTables,
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention, [T, N, H].

    Inside: Q queries of a block, S keys that they see, G query heads per key head, R = G Q.
    """

    # Rematerialised: the T x T scores of every head and layer are most of a forward pass's memory at
    # T = 1024, and recomputing them costs a few percent.
    @functools.partial(jax.checkpoint, static_argnums=(3,))
    def attend(q_QNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, first: int) -> jax.Array:
        num_queries, num_heads, head_size = q_QNH.shape
        num_seen, num_kv_heads = k_SKH.shape[:2]
        heads_per_key = num_heads // num_kv_heads
        # Queries that share a key head are rows of one matrix: no array as large as the scores is
        # transposed.
        q_KGQH = q_QNH.reshape(num_queries, num_kv_heads, heads_per_key, head_size)
        q_KGQH = q_KGQH.transpose(1, 2, 0, 3)
        q_KRH = q_KGQH.reshape(num_kv_heads, heads_per_key * num_queries, head_size)
        scores_KRS = jnp.einsum("krh,skh->krs", q_KRH, k_SKH)
        scores_KGQS = scores_KRS.reshape(num_kv_heads, heads_per_key, num_queries, num_seen)
        scores_KGQS = scores_KGQS.astype(at_least_float32(q_QNH.dtype)) * tables.scale
        if softcap is not None:
            scores_KGQS = softcap * jnp.tanh(scores_KGQS / softcap)
        visible_QS = _visible(first, num_queries, num_seen, tables.window)
        scores_KGQS = jnp.where(visible_QS[None, None], scores_KGQS, -jnp.inf)
        weights_KGQS = jax.nn.softmax(scores_KGQS, axis=-1).astype(q_QNH.dtype)
        weights_KRS = weights_KGQS.reshape(scores_KRS.shape)
        mixed_KRH = jnp.einsum("krs,skh->krh", weights_KRS, v_SKH)
        return mixed_KRH.reshape(q_KGQH.shape).transpose(2, 0, 1, 3).reshape(q_QNH.shape)

    # No query attends to a later key, so a block of queries gets only the keys up to its end.
    ends = _block_ends(q_TNH.shape[0])
    blocks = [
        attend(q_TNH[begin:end], k_TKH[:end], v_TKH[:end], begin)
        for begin, end in itertools.pairwise([0, *ends])
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)


def _block_ends(num_tokens: int) -> list[int]:
    """Where each block of queries ends: at most `MAX_BLOCKS`, each of at least `MIN_BLOCK` tokens."""
    num_blocks = max(1, min(MAX_BLOCKS, num_tokens // MIN_BLOCK))
    return [num_tokens * (block + 1) // num_blocks for block in range(num_blocks)]


def _visible(
    first: int, num_queries: int, num_seen: int, window: jax.Array | int | None
) -> np.ndarray | jax.Array:
    """Whether query q, at position `first + q`, attends to key s, bool [Q, S]."""
    query = np.arange(first, first + num_queries, dtype=np.int32)
    distance_QS = query[:, None] - np.arange(num_seen, dtype=np.int32)[None, :]
    if window is None:
        return distance_QS >= 0
    return (distance_QS >= 0) & (distance_QS < window)
