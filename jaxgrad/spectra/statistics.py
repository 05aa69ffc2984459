"""The statistics of a gradient matrix, from its singular values and its factors.

`prepare_factors` or `prepare_matrix` makes one layer's gradients safe to factorize. `spectra_of_...` and
`extremes_of_...` turn them into numbers, by the names of their columns (defined in `results.columns`).

| case | result |
|---|---|
| zero gradient | all norms 0; effective and stable rank, condition number NaN (undefined) |
| rank 1 | effective and stable rank 1 |
| T_live < min(O, I) | sigma_min is 0, where a full SVD prints rounding noise |
| nuclear norm < 1e-12 | effective rank NaN (undefined) |
| a NaN or infinity in a factor | every statistic NaN, `rank_bound` still counted |

Numbers are float64 where the backend runs with x64, else float32; `rank_bound` is int32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.dtypes import at_least_float32
from jaxgrad.spectra.algorithms import (
    Algorithm,
    build_matrix,
    factored_values,
    prepare_input,
)
from jaxgrad.spectra.block_jacobi import gradient_values, matrix_values
from jaxgrad.spectra.linalg import singular_values
from jaxgrad.spectra.target import target

EFFECTIVE_RANK_FLOOR = 1e-12  # a nuclear norm below has no effective rank (design, section 1)
EXTREMES_TILE = 128  # rows of G in memory at a time while its extremes are sought

# Column -> its number, or list of numbers, for one matrix.
Columns = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """A gradient G [O, I] or its factor D [T, O], divided by a power of two; zeros if not finite.

    Attributes:
        values: the scaled array, its largest magnitude near 1.
        exponent: the power of two is 2^exponent, int32.
        finite: whether the gradient is finite, bool.
        rank_bound: tokens with a gradient, at most min(O, I), int32.
        shape: (O, I) of the gradient.
        num_tokens: T, padding included.
    """

    values: jax.Array
    exponent: jax.Array
    finite: jax.Array
    rank_bound: jax.Array
    shape: tuple[int, int]
    num_tokens: int

    def scaled_back(self, value: jax.Array) -> jax.Array:
        """The gradient's number, from that of the scaled matrix; NaN if the gradient is not finite."""
        return jnp.where(
            self.finite, times_power_of_two(value, self.exponent, self.values.dtype), jnp.nan
        )


@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """One layer's gradients D^T X of projections that share the input X.

    Attributes:
        input_TI: X, or zeros if any entry is not finite.
        grads: projection -> D.
        algorithms: projection -> how its singular values are taken.
        finite_flags: projection -> whether X and whether D are finite, by the names of `FINITE_FLAGS`.
        values: projection -> singular values [min(T, O, I)] of the scaled gradient, of those by "jacobi"
            (`with_jacobi_values`).
    """

    input_TI: jax.Array
    grads: dict[str, ScaledMatrix]
    algorithms: dict[str, Algorithm]
    finite_flags: dict[str, Columns]
    values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


# They show where a NaN first appeared. They are not stored as columns.
FINITE_FLAGS = ("input_finite", "output_grad_finite")


def prepare_factors(
    input_TI: jax.Array, output_grads: dict[str, jax.Array], algorithms: dict[str, Algorithm]
) -> LayerFactors:
    """The factors as any algorithm can take them: finite and scaled.

    Args:
        input_TI: X, float. Rows where every D is zero (padding) change nothing.
        output_grads: projection -> D [T, O].
        algorithms: projection -> how to take its singular values.
    """
    input_TI = input_TI.astype(at_least_float32(input_TI.dtype))
    input_finite = _all_finite(input_TI)
    # LAPACK may loop on NaN, so it gets zeros; the statistics become NaN at the end.
    input_TI = jnp.where(input_finite, input_TI, jnp.zeros_like(input_TI))
    grads, flags = {}, {}
    for name, grad_TO in output_grads.items():
        grad_TO = grad_TO.astype(at_least_float32(grad_TO.dtype))
        size_T = _row_sizes(grad_TO)
        grad_finite = jnp.all(jnp.isfinite(size_T))
        finite = input_finite & grad_finite
        shape = (grad_TO.shape[-1], input_TI.shape[-1])
        rank_bound = _rank_bound(size_T, min(shape))
        grad_TO = jnp.where(finite, grad_TO, jnp.zeros_like(grad_TO))
        grad_TO, exponent = scale_to_one(grad_TO, jnp.where(finite, jnp.max(size_T), 0))
        grads[name] = ScaledMatrix(grad_TO, exponent, finite, rank_bound, shape, len(size_T))
        flags[name] = dict(zip(FINITE_FLAGS, (input_finite, grad_finite), strict=True))
    return LayerFactors(input_TI, grads, algorithms, flags)


def prepare_matrix(
    matrix_OI: jax.Array, input_TI: jax.Array, output_grad_TO: jax.Array
) -> tuple[ScaledMatrix, Columns]:
    """A gradient matrix (method `dense`) made finite and scaled, and its `FINITE_FLAGS`.

    Args:
        matrix_OI: G, float.
        input_TI: X, for the flags only.
        output_grad_TO: D, for the flags; its non-zero rows are counted for the rank bound.
    """
    matrix_OI = matrix_OI.astype(at_least_float32(matrix_OI.dtype))
    finite = _all_finite(matrix_OI)
    matrix_OI = jnp.where(finite, matrix_OI, jnp.zeros_like(matrix_OI))
    matrix_OI, exponent = scale_to_one(matrix_OI)
    num_out, num_in = matrix_OI.shape[-2:]
    rank_bound = _rank_bound(_row_sizes(output_grad_TO), min(num_out, num_in))
    num_tokens = output_grad_TO.shape[-2]
    scaled = ScaledMatrix(matrix_OI, exponent, finite, rank_bound, (num_out, num_in), num_tokens)
    found = (_all_finite(input_TI), _all_finite(output_grad_TO))
    return scaled, dict(zip(FINITE_FLAGS, found, strict=True))


def with_jacobi_values(groups: list[LayerFactors]) -> list[LayerFactors]:
    """The same factors, with the singular values of all that are taken by "jacobi", in one call."""
    taken = [
        (
            factors.input_TI,
            {n: g.values for n, g in factors.grads.items() if factors.algorithms[n] == "jacobi"},
        )
        for factors in groups
    ]
    values = gradient_values([pair for pair in taken if pair[1]])
    return [
        dataclasses.replace(factors, values={name: values[name] for name in grads})
        for factors, (_, grads) in zip(groups, taken, strict=True)
    ]


def spectra_of_factors(factors: LayerFactors) -> dict[str, Columns]:
    """Projection -> the columns `SPECTRA` of its gradient.

    X is factorized once per algorithm in use.
    """
    ways = sorted(set(factors.algorithms.values()) - {"jacobi"})
    prepared = {way: prepare_input(factors.input_TI, way) for way in ways}
    found = {}
    for name, grad in factors.grads.items():
        way = factors.algorithms[name]
        if way == "jacobi":
            sigma_R = factors.values[name]
        else:
            sigma_R = factored_values(prepared[way], grad.values, way)
        mean = _entry_mean(factors.input_TI, grad.values)
        found[name] = _describe(sigma_R, mean, grad)
    return found


def spectra_of_matrix(matrix: ScaledMatrix) -> Columns:
    """The same columns of a gradient matrix, by its full SVD: the definition."""
    if target() == "tpu":
        mean = _row_sums(matrix.values).mean() / matrix.shape[1]
        return _describe(matrix_values(matrix.values), mean, matrix)
    return _describe(singular_values(matrix.values), _wide(matrix.values).mean(), matrix)


def extremes_of_factors(factors: LayerFactors) -> dict[str, Columns]:
    """Projection -> the columns `EXTREMES` of its gradient, built tile by tile."""
    return {
        name: _extreme_columns(*_extremes(factors.input_TI, grad.values), grad)
        for name, grad in factors.grads.items()
    }


def extremes_of_matrix(matrix: ScaledMatrix) -> Columns:
    """The same columns of a gradient matrix."""
    entries = matrix.values
    return _extreme_columns(_wide(entries.max()), _wide(entries.min()), matrix)


def _extreme_columns(largest: jax.Array, smallest: jax.Array, matrix: ScaledMatrix) -> Columns:
    return {
        "entry_max": matrix.scaled_back(largest),
        "entry_min": matrix.scaled_back(smallest),
    }


def _row_sizes(array: jax.Array) -> jax.Array:
    """Largest magnitude in each row; not finite if an entry is not."""
    return jnp.max(jnp.abs(array), axis=-1)


def _all_finite(array: jax.Array) -> jax.Array:
    # By way of row maxima: a third of the time of testing every entry.
    return jnp.all(jnp.isfinite(_row_sizes(array)))


def _wide(array: jax.Array) -> jax.Array:
    """As float64 with x64 on, else float32. Sums of statistics are cheap, so they get full precision."""
    return array.astype(jax.dtypes.canonicalize_dtype(jnp.float64))


def _rank_bound(size_T: jax.Array, num_short: int) -> jax.Array:
    # Counts rows of D that are not zero. Not by their norms: those of the smallest rows underflow.
    return jnp.minimum(jnp.sum(size_T != 0, dtype=jnp.int32), num_short)


def scale_to_one(array: jax.Array, largest: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The array divided by a power of two near its largest magnitude (exact), and the exponent (int32).

    Args:
        array: any shape, float.
        largest: its largest magnitude, if known.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(array)) if largest is None else largest)
    # By multiplication, because `ldexp` of every entry takes twenty times as long: 4 ms of a layer's 29 at
    # Qwen2-1.5B's shape. In two steps, because 2^-exponent overflows for the smallest normal numbers.
    return times_power_of_two(array, -exponent, array.dtype), exponent


def times_power_of_two(value: jax.Array, exponent: jax.Array, exponents_of: Any) -> jax.Array:
    """value 2^exponent, exactly where the result is a normal number.

    Made from the bits of two powers: XLA has no `ldexp` of float64 for TPUs.

    Args:
        value: any shape, float.
        exponent: int32.
        exponents_of: the dtype whose exponents these are, float32 or float64.
    """
    half = exponent // 2
    for part in (half, exponent - half):
        value = value * _power_of_two(part, exponents_of).astype(value.dtype)
    return value


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """2^exponent, a normal number of this dtype."""
    bits = jnp.finfo(dtype)
    as_integer = jnp.int64 if bits.bits == 64 else jnp.int32
    biased = exponent.astype(as_integer) + (1 - bits.minexp)
    shift = jnp.asarray(bits.nmant, as_integer)
    return jax.lax.bitcast_convert_type(jax.lax.shift_left(biased, shift), dtype)


def _row_sums(array: jax.Array) -> jax.Array:
    """Sums over the last axis, wide. A TPU emulates float64, so there only the sums are of it."""
    return _wide(array.sum(-1)) if target() == "tpu" else _wide(array).sum(-1)


def _entry_mean(input_TI: jax.Array, output_grad_TO: jax.Array) -> jax.Array:
    """Mean of D^T X = sum_t (sum_o D_to) (sum_i X_ti) / (O I)."""
    by_token = _row_sums(output_grad_TO) * _row_sums(input_TI)
    return by_token.sum() / (input_TI.shape[-1] * output_grad_TO.shape[-1])


def _extremes(input_TI: jax.Array, output_grad_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest and smallest entry of D^T X, by tiles of its rows: G is never whole in memory."""
    num_tokens, num_out = output_grad_TO.shape
    tile = min(EXTREMES_TILE, num_out)
    num_tiles = -(-num_out // tile)
    # The last column of D is repeated to fill the last tile: a repeated row of G changes no extreme.
    columns = jnp.minimum(jnp.arange(num_tiles * tile, dtype=jnp.int32), num_out - 1)
    tiles_CTO = output_grad_TO[:, columns].reshape(num_tokens, num_tiles, tile).swapaxes(0, 1)

    def extremes_of(tile_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
        entries = build_matrix(input_TI, tile_TO)
        return entries.max(), entries.min()

    largest_C, smallest_C = jax.lax.map(extremes_of, tiles_CTO)
    return _wide(largest_C.max()), _wide(smallest_C.min())


def _describe(sigma_R: jax.Array, entry_mean: jax.Array, matrix: ScaledMatrix) -> Columns:
    num_out, num_in = matrix.shape
    sigma_R = sigma_R[: min(matrix.num_tokens, num_out, num_in)]
    num_values = sigma_R.shape[-1]
    epsilon = float(jnp.finfo(sigma_R.dtype).eps)
    sigma_R = _wide(sigma_R)
    index_R = jnp.arange(num_values, dtype=jnp.int32)
    # Beyond the rank bound, values are exactly zero. An SVD prints rounding noise there, to which the
    # effective rank is the most sensitive statistic.
    sigma_R = jnp.where(index_R < matrix.rank_bound, sigma_R, 0.0)
    total, largest = sigma_R.sum(), sigma_R[0]
    frobenius = jnp.sqrt(jnp.sum(jnp.square(sigma_R)))
    scale, finite = matrix.scaled_back, matrix.finite

    positive_R = sigma_R > 0
    share_R = jnp.where(positive_R, sigma_R / jnp.where(total > 0, total, 1.0), 1.0)
    entropy = -jnp.sum(jnp.where(positive_R, share_R * jnp.log(share_R), 0.0))
    has_rank = finite & (scale(total) >= EFFECTIVE_RANK_FLOOR)
    nonzero = finite & (largest > 0)
    divisor = jnp.where(nonzero, largest, 1.0)
    # The numerical rank, by the cutoff of numpy.linalg.matrix_rank.
    is_numerical = sigma_R > largest * (max(matrix.shape) * epsilon)
    last = jnp.min(jnp.where(is_numerical, sigma_R, jnp.inf), initial=jnp.inf)
    full = num_values == min(matrix.shape)
    return {
        "nuclear_norm": scale(total),
        "sigma_max": scale(largest),
        "sigma_min": scale(sigma_R[-1] if full else jnp.zeros_like(total)),
        "frobenius_norm": scale(frobenius),
        "entry_mean": scale(entry_mean),
        "effective_rank": jnp.where(has_rank, jnp.exp(entropy), jnp.nan),
        "stable_rank": jnp.where(nonzero, jnp.square(frobenius / divisor), jnp.nan),
        "condition_number": jnp.where(nonzero, largest / last, jnp.nan),
        "rank_bound": matrix.rank_bound,
        "singular_values": scale(sigma_R),
    }
