"""Products of symmetric and triangular matrices; on a CPU without the known parts.

A general product does not use that X X^T is symmetric or that half of a triangle is zeros. Here the rows
are cut into s strips, and only a part of the multiplications remains: (s + 1) / 2s for a Gram matrix; 5/8
with two strips and 0.47 with four for two triangles; 9/16 and 0.39 for L^T B L. Other backends take one
product, because theirs are fast only if they are large.

All functions are traceable and take one matrix; `jax.vmap` makes batches.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxgrad.spectra.target import target

HIGHEST = jax.lax.Precision.HIGHEST
# Least rows of a strip: smaller products are slow (measured at 256 and 448 rows).
STRIP_ROWS = 112


def gram_matrix(matrix_MN: jax.Array) -> jax.Array:
    """M M^T [M, M]."""
    strips = _strips(matrix_MN.shape[-2])
    rows = [_product(matrix_MN[strip], matrix_MN[: strip.stop].T) for strip in strips]
    return _mirrored(rows, strips)


def congruent(lower_NN: jax.Array, symmetric_NN: jax.Array) -> jax.Array:
    """L^T B L [N, N], for a lower triangular L and a symmetric B."""
    strips = _strips(lower_NN.shape[-1])
    # L is zero above its diagonal, so a strip of its columns starts at the row of its first column.
    columns = [
        _product(symmetric_NN[strip.start :, strip.start :], lower_NN[strip.start :, strip])
        for strip in strips
    ]
    rows = []
    for index, strip in enumerate(strips):
        earlier = zip(columns[: index + 1], strips[: index + 1], strict=True)
        right = [column[strip.start - first.start :] for column, first in earlier]
        left = lower_NN[strip.start :, strip].T
        rows.append(_product(left, jnp.concatenate(right, axis=-1)))
    return _mirrored(rows, strips)


def upper_product(left_MT: jax.Array, right_NT: jax.Array) -> jax.Array:
    """A B^T [M, N], for A and B with zeros left of their diagonals (R of a QR; M, N <= T)."""

    def block(rows: slice, columns: slice) -> jax.Array:
        start = max(rows.start, columns.start)  # one of the two factors is zero before it
        return _product(left_MT[rows, start:], right_NT[columns, start:].T)

    column_strips = _strips(right_NT.shape[-2])
    row_strips = _strips(left_MT.shape[-2])
    return jnp.block([[block(rows, columns) for columns in column_strips] for rows in row_strips])


def _product(left_MK: jax.Array, right_KN: jax.Array) -> jax.Array:
    return jnp.matmul(left_MK, right_KN, precision=HIGHEST)


def _strips(num_rows: int) -> list[slice]:
    """Equal strips of the rows; on a CPU as many as `STRIP_ROWS` allows, elsewhere one."""
    count = max(1, num_rows // STRIP_ROWS) if target() == "cpu" else 1
    bounds = [num_rows * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _mirrored(rows: list[jax.Array], strips: list[slice]) -> jax.Array:
    """The symmetric matrix, from strips of its rows that each end with the block on the diagonal."""
    full_rows = []
    for index, strip in enumerate(strips):
        mirrored = [later[:, strip].T for later in rows[index + 1 :]]
        full_rows.append(jnp.concatenate([rows[index], *mirrored], axis=1))
    return jnp.concatenate(full_rows)
