"""The statistics of a gradient matrix, from its singular values and its factors.

| case | what comes out |
|---|---|
| zero gradient | all norms 0; effective and stable rank, condition number NaN (undefined) |
| rank 1 | effective and stable rank 1 |
| T_live < min(O, I) | sigma_min is 0, where a full SVD prints rounding noise |
| nuclear norm < 1e-12 | effective rank NaN (undefined) |
| a NaN or infinity in a factor | every statistic NaN, `rank_bound` still counted |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgrad.dtypes import at_least_float32
from jaxgrad.spectra.algorithms import (
    Algorithm,
    build_matrix,
    factored_values,
    prepare_input,
)
from jaxgrad.spectra.linalg import singular_values

EFFECTIVE_RANK_FLOOR = 1e-12  # a nuclear norm below has no effective rank (design, section 1)
EXTREMES_TILE = 128  # rows of G that are held at once while its extremes are sought


class Statistics(NamedTuple):
    """Numbers of one gradient matrix G [O, I]; arrays with leading axes under `vmap`.

    float64 where the backend runs with x64, else float32; `rank_bound` int32. `entry_max` and
    `entry_min` are NaN unless asked for. `singular_values` [min(T, O, I)], descending, zero beyond
    the rank bound. `partner_cosine` and `layer_cosines` are filled in by whoever has all layers
    (`similarity`); here they are NaN and empty. `input_finite` and `output_grad_finite` (bool) say of X
    and D whether all their entries are: they tell where a NaN first appeared, and are no statistics.
    """

    nuclear_norm: jax.Array
    sigma_max: jax.Array
    sigma_min: jax.Array
    frobenius_norm: jax.Array
    entry_mean: jax.Array
    entry_max: jax.Array
    entry_min: jax.Array
    effective_rank: jax.Array
    stable_rank: jax.Array
    condition_number: jax.Array
    rank_bound: jax.Array
    singular_values: jax.Array
    partner_cosine: jax.Array
    layer_cosines: jax.Array
    input_finite: jax.Array
    output_grad_finite: jax.Array


def shared_input_statistics(
    input_TI: jax.Array,
    output_grads: dict[str, jax.Array],
    algorithms: dict[str, Algorithm],
    *,
    extremes: bool,
) -> dict[str, Statistics]:
    """Statistics of the gradients D^T X of all projections that share the input X.

    Args:
        input_TI: X, float. Rows where every D is zero change nothing.
        output_grads: projection -> D [T, O].
        algorithms: projection -> how to take its singular values; X is factorized once for each
            algorithm that occurs.
        extremes: also find the largest and smallest entry, by tiles of G.
    """
    input_TI = input_TI.astype(at_least_float32(input_TI.dtype))
    input_finite = _all_finite(input_TI)
    # LAPACK may loop on NaN: it gets zeros instead, and the statistics become NaN at the end.
    input_TI = jnp.where(input_finite, input_TI, jnp.zeros_like(input_TI))
    prepared = {way: prepare_input(input_TI, way) for way in sorted(set(algorithms.values()))}
    results = {}
    for name, grad_TO in output_grads.items():
        grad_TO = grad_TO.astype(at_least_float32(grad_TO.dtype))
        size_T = _row_sizes(grad_TO)
        grad_finite = jnp.all(jnp.isfinite(size_T))
        finite = input_finite & grad_finite
        rank_bound = _rank_bound(size_T, min(grad_TO.shape[-1], input_TI.shape[-1]))
        grad_TO = jnp.where(finite, grad_TO, jnp.zeros_like(grad_TO))
        grad_TO, exponent = scale_to_one(grad_TO, jnp.where(finite, jnp.max(size_T), 0))
        way = algorithms[name]
        sigma_R = factored_values(prepared[way], grad_TO, way)
        mean = _entry_mean(input_TI, grad_TO)
        largest, smallest = _extremes(input_TI, grad_TO) if extremes else (jnp.nan, jnp.nan)
        num_out, num_in = grad_TO.shape[-1], input_TI.shape[-1]
        sigma_R = sigma_R[: min(grad_TO.shape[-2], num_out, num_in)]
        results[name] = _describe(
            sigma_R,
            (mean, largest, smallest),
            exponent,
            rank_bound,
            (num_out, num_in),
            finite,
            (input_finite, grad_finite),
        )
    return results


def matrix_statistics(
    matrix_OI: jax.Array, input_TI: jax.Array, output_grad_TO: jax.Array, *, extremes: bool
) -> Statistics:
    """Statistics of a gradient matrix by its full SVD: method `dense`, the definition.

    Args:
        matrix_OI: G, float.
        input_TI: X, of which only is told whether it is finite.
        output_grad_TO: D, likewise, and its rows that are not zero are counted, for the rank bound.
        extremes: also give the largest and smallest entry.
    """
    matrix_OI = matrix_OI.astype(at_least_float32(matrix_OI.dtype))
    finite = _all_finite(matrix_OI)
    matrix_OI = jnp.where(finite, matrix_OI, jnp.zeros_like(matrix_OI))
    matrix_OI, exponent = scale_to_one(matrix_OI)
    entries = _wide(matrix_OI)
    largest, smallest = (entries.max(), entries.min()) if extremes else (jnp.nan, jnp.nan)
    num_out, num_in = matrix_OI.shape[-2:]
    rank_bound = _rank_bound(_row_sizes(output_grad_TO), min(num_out, num_in))
    sigma_R = singular_values(matrix_OI)[: min(output_grad_TO.shape[-2], num_out, num_in)]
    return _describe(
        sigma_R,
        (entries.mean(), largest, smallest),
        exponent,
        rank_bound,
        (num_out, num_in),
        finite,
        (_all_finite(input_TI), _all_finite(output_grad_TO)),
    )


def _row_sizes(array: jax.Array) -> jax.Array:
    """Largest magnitude in each row; not finite where a row is not."""
    return jnp.max(jnp.abs(array), axis=-1)


def _all_finite(array: jax.Array) -> jax.Array:
    # Largest magnitudes first: a third of the time of asking every entry.
    return jnp.all(jnp.isfinite(_row_sizes(array)))


def _wide(array: jax.Array) -> jax.Array:
    """float64 with x64 on, float32 without: sums of statistics cost nothing, so they are exact."""
    return array.astype(jax.dtypes.canonicalize_dtype(jnp.float64))


def _rank_bound(size_T: jax.Array, num_short: int) -> jax.Array:
    # Rows of D with any entry but zero; not by sums of squares: those of the smallest rows underflow.
    return jnp.minimum(jnp.sum(size_T != 0, dtype=jnp.int32), num_short)


def scale_to_one(array: jax.Array, largest: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The array over a power of two (exact) near its largest magnitude, and the exponent (int32).

    Args:
        array: any shape, float.
        largest: its largest magnitude, where that is known.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(array)) if largest is None else largest)
    # Two steps: 2^-exponent alone overflows for the smallest normal numbers. Products with powers of two,
    # because `ldexp` of every entry takes twenty times as long: 4 ms of a layer's 29 at Qwen2-1.5B's shape.
    half, one = exponent // 2, jnp.ones((), array.dtype)
    return array * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent), exponent


def _entry_mean(input_TI: jax.Array, output_grad_TO: jax.Array) -> jax.Array:
    """Mean of D^T X = sum_t (sum_o D_to) (sum_i X_ti) / (O I)."""
    by_token = _wide(output_grad_TO).sum(-1) * _wide(input_TI).sum(-1)
    return by_token.sum() / (input_TI.shape[-1] * output_grad_TO.shape[-1])


def _extremes(input_TI: jax.Array, output_grad_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest and smallest entry of D^T X, by tiles of its rows, so that G is never whole."""
    num_tokens, num_out = output_grad_TO.shape
    tile = min(EXTREMES_TILE, num_out)
    num_tiles = -(-num_out // tile)
    # The last tile is filled by repeating the last column of D: a repeated row changes no extreme.
    columns = jnp.minimum(jnp.arange(num_tiles * tile, dtype=jnp.int32), num_out - 1)
    tiles_CTO = output_grad_TO[:, columns].reshape(num_tokens, num_tiles, tile).swapaxes(0, 1)

    def extremes_of(tile_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
        entries = build_matrix(input_TI, tile_TO)
        return entries.max(), entries.min()

    largest_C, smallest_C = jax.lax.map(extremes_of, tiles_CTO)
    return _wide(largest_C.max()), _wide(smallest_C.min())


def _describe(
    sigma_R: jax.Array,
    entries: tuple[jax.Array | float, jax.Array | float, jax.Array | float],
    exponent: jax.Array,
    rank_bound: jax.Array,
    shape: tuple[int, int],
    finite: jax.Array,
    factors_finite: tuple[jax.Array, jax.Array],
) -> Statistics:
    num_values = sigma_R.shape[-1]
    epsilon = float(jnp.finfo(sigma_R.dtype).eps)
    sigma_R = _wide(sigma_R)
    index_R = jnp.arange(num_values, dtype=jnp.int32)
    # Beyond the rank bound a value is exactly zero; what an SVD prints there is rounding noise, to
    # which the effective rank is the most sensitive of all.
    sigma_R = jnp.where(index_R < rank_bound, sigma_R, 0.0)
    total, largest = sigma_R.sum(), sigma_R[0]
    frobenius = jnp.sqrt(jnp.sum(jnp.square(sigma_R)))

    def scale(value: jax.Array) -> jax.Array:
        return jnp.where(finite, jnp.ldexp(value, exponent), jnp.nan)

    positive_R = sigma_R > 0
    share_R = jnp.where(positive_R, sigma_R / jnp.where(total > 0, total, 1.0), 1.0)
    entropy = -jnp.sum(jnp.where(positive_R, share_R * jnp.log(share_R), 0.0))
    has_rank = finite & (scale(total) >= EFFECTIVE_RANK_FLOOR)
    nonzero = finite & (largest > 0)
    divisor = jnp.where(nonzero, largest, 1.0)
    # The numerical rank, by the cutoff of numpy.linalg.matrix_rank.
    is_numerical = sigma_R > largest * (max(shape) * epsilon)
    last = jnp.min(jnp.where(is_numerical, sigma_R, jnp.inf), initial=jnp.inf)
    full = num_values == min(shape)
    mean, top, bottom = (scale(jnp.asarray(value, sigma_R.dtype)) for value in entries)
    return Statistics(
        nuclear_norm=scale(total),
        sigma_max=scale(largest),
        sigma_min=scale(sigma_R[-1] if full else jnp.zeros_like(total)),
        frobenius_norm=scale(frobenius),
        entry_mean=mean,
        entry_max=top,
        entry_min=bottom,
        effective_rank=jnp.where(has_rank, jnp.exp(entropy), jnp.nan),
        stable_rank=jnp.where(nonzero, jnp.square(frobenius / divisor), jnp.nan),
        condition_number=jnp.where(nonzero, largest / last, jnp.nan),
        rank_bound=rank_bound,
        singular_values=scale(sigma_R),
        partner_cosine=jnp.full_like(total, jnp.nan),
        layer_cosines=jnp.zeros((0,), sigma_R.dtype),
        input_finite=factors_finite[0],
        output_grad_finite=factors_finite[1],
    )
