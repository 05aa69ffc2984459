"""Products of symmetric and triangular matrices: on a CPU, without what is known beforehand.

A general matrix product does not know that X X^T is symmetric or that a triangle is half zeros. By strips
of rows, s of them, (s + 1) / 2s of a Gram matrix remain; of two triangles' product 5/8 for two strips and
0.47 for four, and of L^T B L 9/16 and 0.39. Other backends take one product: theirs are fast because they
are large.

All functions are traceable; a batch is `jax.vmap`'s.
"""

import itertools

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
# Rows of a strip: with fewer, the products are too small to be fast (measured at 256 and 448 rows).
STRIP_ROWS = 112


def gram_matrix(matrix_MN: jax.Array) -> jax.Array:
    """M M^T [M, M]."""
    strips = _strips(matrix_MN.shape[-2])
    rows = [_product(matrix_MN[strip], matrix_MN[: strip.stop].T) for strip in strips]
    return _mirrored(rows, strips)


def congruent(lower_NN: jax.Array, symmetric_NN: jax.Array) -> jax.Array:
    """L^T B L [N, N], of a lower triangular L and a symmetric B."""
    strips = _strips(lower_NN.shape[-1])
    # Above its diagonal L is zero: a strip of its columns begins in its own first row, and meets the
    # rows of B L from there on.
    columns = [
        _product(symmetric_NN[strip.start :, strip.start :], lower_NN[strip.start :, strip])
        for strip in strips
    ]
    rows = []
    for index, strip in enumerate(strips):
        begun = zip(columns[: index + 1], strips[: index + 1], strict=True)
        reached = [column[strip.start - first.start :] for column, first in begun]
        left = lower_NN[strip.start :, strip].T
        rows.append(_product(left, jnp.concatenate(reached, axis=-1)))
    return _mirrored(rows, strips)


def upper_product(left_MT: jax.Array, right_NT: jax.Array) -> jax.Array:
    """A B^T [M, N], of A and B with zeros left of their diagonals (R of a QR; M, N <= T)."""

    def block(above: slice, beside: slice) -> jax.Array:
        start = max(above.start, beside.start)  # before it one of the two rows is zero
        return _product(left_MT[above, start:], right_NT[beside, start:].T)

    columns = _strips(right_NT.shape[-2])
    strips = _strips(left_MT.shape[-2])
    return jnp.block([[block(above, beside) for beside in columns] for above in strips])


def _product(left_MK: jax.Array, right_KN: jax.Array) -> jax.Array:
    return jnp.matmul(left_MK, right_KN, precision=HIGHEST)


def _strips(num_rows: int) -> list[slice]:
    """The rows in equal strips, as many as are worth it."""
    count = max(1, num_rows // STRIP_ROWS) if jax.default_backend() == "cpu" else 1
    bounds = [num_rows * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _mirrored(rows: list[jax.Array], strips: list[slice]) -> jax.Array:
    """The symmetric matrix, from strips of its rows that each end with the block on the diagonal."""
    whole = []
    for index, strip in enumerate(strips):
        beyond = [later[:, strip].T for later in rows[index + 1 :]]
        whole.append(jnp.concatenate([rows[index], *beyond], axis=1))
    return jnp.concatenate(whole)
