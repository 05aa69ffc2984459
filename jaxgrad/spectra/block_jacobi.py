"""Singular values by products of matrices: what TPUs and GPUs do well, in loops that compile once.

XLA expands a QR or an SVD for a TPU into programs that take minutes to compile for each shape, and runs
them one matrix at a time. Here everything but the eigenvectors of small blocks is a product or a loop over
one body, and batches by `jax.vmap`:

1. `row_space_factor`: F = C Q with Q Q^T = 1, by three rounds of a shifted Cholesky factorization of Q Q^T
   (Fukaya et al., arXiv 1809.11085). C has F's singular values and no more columns than F has rows.
2. The core A = C_D^T C_X has those of G = D^T X. Twice the same factorization, of A and of C^T, sorts the
   large singular values before the small ones.
3. `jacobi_values`: one-sided block Jacobi (Drmac and Veselic, SIAM J. Matrix Anal. 29, 2008): pairs of
   blocks of columns are made orthogonal until all are. The values are the norms of the columns, corrected
   to second order for what is left between them.

A block's Gram matrix holds no value below sqrt(eps) of its largest. Its eigenvectors would mix the columns
of such values anew each time, and never converge. So entries that are nothing but rounding are set to zero
before the eigenvectors are taken: then a block mixes only what is not yet orthogonal.

All functions but `gradient_values` take one matrix. All take float32 and are traceable.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.spectra.linalg import symmetric_eigenvectors
from jaxgrad.spectra.products import HIGHEST

EPSILON = float(np.finfo(np.float32).eps)
# Rows of a Cholesky step, columns of a block: the eigenvectors are those of twice as many.
BLOCK = 32
ROUNDS = 3
# Columns count as orthogonal at this cosine: the second-order correction leaves its cube.
ORTHOGONAL = 1e-3
# ... or where their inner product is rounding of the larger one's square.
ROUNDING = 4.0 * EPSILON
# At most. Seen on real factors and on graded matrices: 3 to 5.
MAX_SWEEPS = 12
# Tokens that are summed at a time. What repeated tokens cancel is then lost in none of the sums.
TOKENS_AT_ONCE = 64
# Factors of several widths go through one program if this many times their numbers are enough for it.
MOST_FILLING = 1.5


def gradient_values(
    groups: Sequence[tuple[jax.Array, Mapping[str, jax.Array]]],
) -> dict[str, jax.Array]:
    """Projection -> singular values [min(T, O, I)] of D^T X, descending.

    Matrices are filled up with zeros, which change no value, and go through each step in one call: for a
    TPU each product takes seconds to compile.

    Args:
        groups: each an input X [T, I] and projection -> D [T, O], scaled to entries near one.
    """
    found: dict[str, jax.Array] = {}
    for num_tokens in sorted({input_TI.shape[0] for input_TI, _ in groups}):
        same = [group for group in groups if group[0].shape[0] == num_tokens]
        arrays = [array for input_TI, grads in same for array in (input_TI, *grads.values())]
        narrow = iter(_with_few_columns(arrays))
        cores, shapes = [], {}
        for input_TI, grads in same:
            few_TI = next(narrow)
            for name, grad_TO in grads.items():
                cores.append((next(narrow), few_TI))
                shapes[name] = min(num_tokens, grad_TO.shape[1], input_TI.shape[1])
        values_PN = jax.vmap(_core_values)(*_stacked_pairs(cores))
        for index, (name, size) in enumerate(shapes.items()):
            found[name] = values_PN[index, :size]
    return found


def matrix_values(matrix_MN: jax.Array) -> jax.Array:
    """Singular values [min(M, N)] of a matrix of any scale, descending."""
    if matrix_MN.shape[0] > matrix_MN.shape[1]:
        matrix_MN = matrix_MN.T
    return jacobi_values(row_space_factor(row_space_factor(matrix_MN).T))


def _core_values(grad_TN: jax.Array, input_TN: jax.Array) -> jax.Array:
    """Singular values of the core, after two factorizations that bring the large ones to the front."""
    core_NN = token_sum(grad_TN, input_TN)
    turned = jax.lax.fori_loop(0, 2, lambda _, core: row_space_factor(core).T, core_NN)
    return jacobi_values(turned.T)


def _with_few_columns(arrays_TW: Sequence[jax.Array]) -> list[jax.Array]:
    """Each factor, or in place of one with more columns than rows its `row_space_factor` [T, T]."""
    found = list(arrays_TW)
    wide = [index for index, array in enumerate(found) if array.shape[1] > array.shape[0]]
    for group in _width_groups([(found[index].shape[1], index) for index in wide]):
        width = max(found[index].shape[1] for index in group)
        stacked = jnp.stack([_filled(found[index], width) for index in group])
        for index, few_TT in zip(group, jax.vmap(row_space_factor)(stacked), strict=True):
            found[index] = few_TT
    return found


def _width_groups(widths: list[tuple[int, int]]) -> list[list[int]]:
    """Indices of (width, index) in groups that, filled up to one width, grow by half at most."""
    groups: list[list[tuple[int, int]]] = []
    for width, index in sorted(widths, reverse=True):
        group = groups[-1] if groups else []
        together = sum(other for other, _ in group) + width
        if group and group[0][0] * (len(group) + 1) <= MOST_FILLING * together:
            group.append((width, index))
        else:
            groups.append([(width, index)])
    return [[index for _, index in group] for group in groups]


def _stacked_pairs(pairs: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The pairs' left and right arrays, filled up to one square core [N, N], N = most columns."""
    size = max(array.shape[1] for pair in pairs for array in pair)
    left, right = ([_filled(array, size) for array in side] for side in zip(*pairs, strict=True))
    return jnp.stack(left), jnp.stack(right)


def _filled(array_TW: jax.Array, width: int) -> jax.Array:
    return jnp.pad(array_TW, ((0, 0), (0, width - array_TW.shape[1])))


def token_sum(left_TM: jax.Array, right_TN: jax.Array) -> jax.Array:
    """A^T B [M, N], the rounding of sums over many tokens carried along (Knuth's exact addition)."""
    num_tokens = left_TM.shape[0]
    if num_tokens <= TOKENS_AT_ONCE:
        return _product(left_TM.T, right_TN)
    num_parts = -(-num_tokens // TOKENS_AT_ONCE)
    filling = ((0, num_parts * TOKENS_AT_ONCE - num_tokens), (0, 0))
    parts = [
        jnp.pad(array, filling).reshape(num_parts, TOKENS_AT_ONCE, -1)
        for array in (left_TM, right_TN)
    ]

    def add(sums: tuple[jax.Array, jax.Array], part: list[jax.Array]) -> tuple:
        total, lost = sums
        more = _product(part[0].T, part[1])
        new = total + more
        kept = new - total
        lost = lost + ((total - (new - kept)) + (more - kept))
        return (new, lost), None

    zeros = jnp.zeros((left_TM.shape[1], right_TN.shape[1]), left_TM.dtype)
    (total, lost), _ = jax.lax.scan(add, (zeros, zeros), parts)
    return total + lost


def row_space_factor(factor_NW: jax.Array) -> jax.Array:
    """C [N, N], lower triangular up to rounding, with F = C Q and Q Q^T = 1, for N <= W.

    Each round takes a Cholesky factor of Q Q^T + shift and solves with it. A shift of the rounding's size
    keeps the factor real; what it takes from small directions the next round gives back. C is taken as
    F Q^T, not as the product of the factors: then F - C Q is rounding whatever the rounds have lost.
    """
    largest = jnp.max(jnp.abs(factor_NW))
    scaled = factor_NW / jnp.where(largest > 0, largest, 1.0)
    # Rows of one norm: tokens may differ by many orders of magnitude.
    norm_N = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=-1, keepdims=True))
    basis = scaled / jnp.where(norm_N > 0, norm_N, 1.0)
    identity = jnp.eye(factor_NW.shape[0], dtype=factor_NW.dtype)

    def orthogonalize(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple:
        basis, _ = state
        gram_NN = _product(basis, basis.T)
        shift = 4 * EPSILON * jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(gram_NN))), 1.0)
        inverse_NN = inverse_cholesky_factor(gram_NN + shift * identity, shift / 2)
        return _product(inverse_NN, basis), shift

    start = (basis, jnp.zeros((), factor_NW.dtype))
    basis, shift = jax.lax.fori_loop(0, ROUNDS, orthogonalize, start)
    # The last round finds rows of norm one in all directions that count, and leaves (1 + shift)^-1/2 of it.
    return _product(scaled, basis.T) * (largest * jnp.sqrt(1 + shift))


def inverse_cholesky_factor(matrix_NN: jax.Array, least_pivot: jax.Array | float) -> jax.Array:
    """L^-1 [N, N] for a positive definite L L^T, by blocks; smaller pivots are taken as `least_pivot`."""
    num_rows = matrix_NN.shape[0]
    size = -(-num_rows // BLOCK) * BLOCK
    filling = jnp.where(jnp.arange(size) < num_rows, 0.0, 1.0).astype(matrix_NN.dtype)
    missing = size - num_rows
    matrix = jnp.pad(matrix_NN, ((0, missing), (0, missing))) + jnp.diag(filling)
    index = jnp.arange(size)[:, None]

    def eliminate(step: jax.Array, state: jax.Array) -> jax.Array:
        # Beside the matrix stands the identity. It becomes the inverse.
        begin = step * BLOCK
        rows = jax.lax.dynamic_slice_in_dim(state, begin, BLOCK)
        pivot = jax.lax.dynamic_slice_in_dim(rows, begin, BLOCK, axis=1)
        rows = _product(_small_inverse(pivot, least_pivot), rows)
        below = jnp.where(index >= begin + BLOCK, rows[:, :size].T, 0.0)
        state = state - _product(below, rows)
        return jax.lax.dynamic_update_slice_in_dim(state, rows, begin, axis=0)

    state = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)], axis=1)
    state = jax.lax.fori_loop(0, size // BLOCK, eliminate, state)
    return state[:num_rows, size : size + num_rows]


def _small_inverse(pivot_BB: jax.Array, least_pivot: jax.Array | float) -> jax.Array:
    """L^-1 of one block, a column at a time."""
    index = jnp.arange(BLOCK)[:, None]

    def eliminate(step: jax.Array, state: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(state, step, 1)
        pivot = jax.lax.dynamic_slice_in_dim(row, step, 1, axis=1)
        row = row * jax.lax.rsqrt(jnp.maximum(pivot, least_pivot))
        state = state - jnp.where(index > step, row[:, :BLOCK].T, 0.0) * row
        return jax.lax.dynamic_update_slice_in_dim(state, row, step, axis=0)

    state = jnp.concatenate([pivot_BB, jnp.eye(BLOCK, dtype=pivot_BB.dtype)], axis=1)
    return jax.lax.fori_loop(0, BLOCK, eliminate, state)[:, BLOCK:]


def jacobi_values(matrix_MN: jax.Array) -> jax.Array:
    """Singular values [N] of a matrix with N <= M columns, descending."""
    num_rows, num_columns = matrix_MN.shape
    missing = -num_columns % (2 * BLOCK)
    num_blocks = (num_columns + missing) // BLOCK
    rounds = _tournament(num_blocks)
    pairs, places = jnp.asarray(rounds), jnp.asarray(np.argsort(rounds, axis=1))
    columns = jnp.pad(matrix_MN.T, ((0, missing), (0, 0)))
    pair_shape = (num_blocks // 2, 2 * BLOCK, num_rows)
    same = jnp.broadcast_to(jnp.eye(2 * BLOCK, dtype=bool), (*pair_shape[:2], 2 * BLOCK))

    def meet(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        blocks, num_open = state
        pair = blocks[pairs[index]].reshape(pair_shape)
        gram = jnp.einsum("pim,pjm->pij", pair, pair, precision=HIGHEST)
        is_open = _not_orthogonal(gram)
        gram = jnp.where(is_open | same, gram, 0.0)
        vectors = jax.vmap(symmetric_eigenvectors)(gram)
        # Largest first, and the lower block first in each pair: without this order it does not converge.
        pair = jnp.einsum("pij,pim->pjm", vectors[:, :, ::-1], pair, precision=HIGHEST)
        num_open = num_open + jnp.sum(is_open, dtype=jnp.int32)
        return pair.reshape(blocks.shape)[places[index]], num_open

    def sweep(state: tuple) -> tuple:
        blocks, _, count = state
        none = jnp.zeros((), jnp.int32)
        blocks, num_open = jax.lax.fori_loop(0, len(rounds), meet, (blocks, none))
        return blocks, num_open, count + 1

    start = (columns.reshape(num_blocks, BLOCK, num_rows), jnp.int32(1), jnp.int32(0))
    blocks, _, _ = jax.lax.while_loop(
        lambda state: (state[1] > 0) & (state[2] < MAX_SWEEPS), sweep, start
    )
    return _corrected_norms(blocks.reshape(-1, num_rows))[:num_columns]


def _not_orthogonal(gram: jax.Array) -> jax.Array:
    """Which pairs of different columns are to be turned, from Gram matrices [..., n, n]."""
    square = jnp.diagonal(gram, axis1=-2, axis2=-1)
    norm = jnp.sqrt(square)
    by_cosine = ORTHOGONAL * norm[..., :, None] * norm[..., None, :]
    by_rounding = ROUNDING * jnp.maximum(square[..., :, None], square[..., None, :])
    different = jnp.broadcast_to(~jnp.eye(gram.shape[-1], dtype=bool), gram.shape)
    return different & (jnp.abs(gram) > jnp.maximum(by_cosine, by_rounding))


def _corrected_norms(columns_NM: jax.Array) -> jax.Array:
    """Descending roots of the eigenvalues of a nearly diagonal Gram matrix, to second order.

    g_jj + sum over i of g_ij^2 / (g_jj - g_ii). So a small column loses what the rotations' rounding has
    left in it of the large ones.
    """
    gram_NN = _product(columns_NM, columns_NM.T)
    square_N = jnp.diagonal(gram_NN)
    gap_NN = square_N[:, None] - square_N[None, :]
    is_small = jnp.abs(gram_NN) < jnp.abs(gap_NN) / 4
    part_NN = jnp.where(is_small, jnp.square(gram_NN) / jnp.where(is_small, gap_NN, 1.0), 0.0)
    values_N = jnp.sqrt(jnp.maximum(square_N + jnp.sum(part_NN, axis=1), 0.0))
    return jnp.sort(values_N, descending=True)


@functools.cache
def _tournament(num_blocks: int) -> np.ndarray:
    """Rounds [num_blocks - 1, num_blocks] in which each block meets each other once, int32.

    Neighbours meet, and the lower one stands first.
    """
    order, rounds = list(range(num_blocks)), []
    for _ in range(num_blocks - 1):
        pairs = zip(order[: num_blocks // 2], order[: num_blocks // 2 - 1 : -1], strict=True)
        rounds.append([block for pair in pairs for block in sorted(pair)])
        order = [order[0], order[-1], *order[1:-1]]
    return np.array(rounds, np.int32)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=HIGHEST)
