"""LAPACK calls that cannot deadlock.

A batched LAPACK call of jaxlib 0.10.0 to 0.11.0 splits its batch over XLA's CPU thread pool and blocks a
worker while it waits. Two such calls at once in one jit can fill the pool and hang forever (jax#36927).
So on the CPU no call is batched: `jax.vmap` makes a loop of it. This costs nothing measurable, because
the batch gained nothing from threads. Other backends keep the batched call.

Shapes are [..., rows, cols], of one float dtype. All functions are traceable.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.spectra.target import target

# From this size on, a separate call makes the matrix tridiagonal: for the one inside `_values_only`, jaxlib
# allots too little work space for blocks. 1.3 times faster at 192 and 256, 1.5 at 448.
TRIDIAGONAL_ROWS = 160


def _loop_on_cpu(call: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    looped = jax.custom_batching.sequential_vmap(call)

    def choose(matrix: jax.Array) -> jax.Array:
        if target() == "cpu":
            return looped(matrix)
        # A program made for another device may be run on a CPU (in tests), and must not hang there, either.
        return jax.lax.platform_dependent(matrix, cpu=looped, default=call)

    choose.__doc__ = call.__doc__
    return choose


@_loop_on_cpu
def triangular_factor(matrix_MN: jax.Array) -> jax.Array:
    """R [min(M, N), N] of a Householder QR."""
    return jnp.linalg.qr(matrix_MN, mode="r")


@_loop_on_cpu
def singular_values(matrix_MN: jax.Array) -> jax.Array:
    """Singular values [min(M, N)], descending. On the CPU by divide and conquer, as in PyTorch."""
    return jnp.linalg.svd(matrix_MN, compute_uv=False)


@_loop_on_cpu
def symmetric_eigenvalues(matrix_NN: jax.Array) -> jax.Array:
    """Eigenvalues [N] of a symmetric matrix, ascending; without eigenvectors if jaxlib allows it."""
    if target() == "cpu" and _has_values_only():
        if matrix_NN.shape[-1] >= TRIDIAGONAL_ROWS:
            _, diagonal_N, beside_N, _ = jax.lax.linalg.tridiagonal(matrix_NN)
            # `_values_only` reads the diagonal and the upper triangle only.
            matrix_NN = jnp.diag(diagonal_N) + jnp.diag(beside_N, 1)
        return _values_only(matrix_NN)
    return jnp.linalg.eigvalsh(matrix_NN)


def _values_only(matrix_NN: jax.Array) -> jax.Array:
    """Eigenvalues by LAPACK's syevd without vectors: half the time of `eigvalsh`, which computes them too.

    Reads the diagonal and the upper triangle only.
    """
    from jaxlib import lapack  # a private name: see `_has_values_only`

    num_rows = matrix_NN.shape[-1]
    call = jax.ffi.ffi_call(
        # Also loads LAPACK; otherwise the call would jump to address zero.
        lapack.prepare_lapack_call("syevd_ffi", matrix_NN.dtype),
        (
            jax.ShapeDtypeStruct(matrix_NN.shape, matrix_NN.dtype),
            jax.ShapeDtypeStruct((num_rows,), matrix_NN.dtype),
            jax.ShapeDtypeStruct((), np.int32),
        ),
        input_layouts=[(0, 1)],
        output_layouts=[(0, 1), (0,), ()],
        input_output_aliases={0: 0},
    )
    _, values_N, info = call(matrix_NN, mode=np.uint8(ord("N")), uplo=np.uint8(ord("L")))
    return jnp.where(info == 0, values_N, jnp.nan)


@functools.cache
def _has_values_only() -> bool:
    """Whether `_values_only` works with this jaxlib: its private names may change."""
    probe = np.array([[2.0, 1.0], [1.0, 2.0]])
    try:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            found = [
                np.asarray(_values_only(jnp.asarray(probe, dtype)))
                for dtype in (np.float32, np.float64)
            ]
    except Exception:
        # An unknown target or signature may raise anything; the public call does the same, slower.
        return False
    return all(np.allclose(values, [1.0, 3.0], rtol=1e-5) for values in found)


@_loop_on_cpu
def symmetric_eigenvectors(matrix_NN: jax.Array) -> jax.Array:
    """Eigenvectors [N, N] of a symmetric matrix, as columns, those of small eigenvalues first."""
    return jnp.linalg.eigh(matrix_NN, symmetrize_input=False).eigenvectors


@_loop_on_cpu
def cholesky_factor(matrix_NN: jax.Array) -> jax.Array:
    """Lower L [N, N] with L L^T = matrix, which must be symmetric; NaN if it is not positive definite."""
    return jax.lax.linalg.cholesky(matrix_NN, symmetrize_input=False)
