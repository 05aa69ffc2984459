"""LAPACK calls that cannot deadlock.

A batched LAPACK call in jaxlib 0.10.0 to 0.11.0 splits its batch over XLA's CPU thread pool and blocks
a worker while it waits; two such calls in flight in one jit can fill the pool and hang for ever
(jax#36927). So on the CPU every call is unbatched: under `jax.vmap` it becomes a loop, which costs
nothing measurable, because the batch gained nothing from threads. Other backends keep the batched call.

Shapes are [..., rows, cols] of one float dtype; all functions are traceable.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# From this size on a matrix is made tridiagonal by a call of its own: the one inside `_values_only` gets
# too little work space from jaxlib to go by blocks. 1.3 times faster at 192 and 256, 1.5 at 448.
TRIDIAGONAL_ROWS = 160


def _loop_on_cpu(call: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    looped = jax.custom_batching.sequential_vmap(call)

    def choose(matrix: jax.Array) -> jax.Array:
        # The default backend is where a jit of ours runs: the program never mixes backends.
        return looped(matrix) if jax.default_backend() == "cpu" else call(matrix)

    choose.__doc__ = call.__doc__
    return choose


@_loop_on_cpu
def triangular_factor(matrix_MN: jax.Array) -> jax.Array:
    """R [min(M, N), N] of a Householder QR."""
    return jnp.linalg.qr(matrix_MN, mode="r")


@_loop_on_cpu
def singular_values(matrix_MN: jax.Array) -> jax.Array:
    """Singular values [min(M, N)], descending. Divide and conquer on the CPU, as PyTorch does."""
    return jnp.linalg.svd(matrix_MN, compute_uv=False)


@_loop_on_cpu
def symmetric_eigenvalues(matrix_NN: jax.Array) -> jax.Array:
    """Eigenvalues [N] of a symmetric matrix, ascending; no vectors are made where that can be had."""
    if jax.default_backend() == "cpu" and _has_values_only():
        if matrix_NN.shape[-1] >= TRIDIAGONAL_ROWS:
            _, diagonal_N, beside_N, _ = jax.lax.linalg.tridiagonal(matrix_NN)
            # Upper and diagonal alone: `_values_only` reads no more.
            matrix_NN = jnp.diag(diagonal_N) + jnp.diag(beside_N, 1)
        return _values_only(matrix_NN)
    return jnp.linalg.eigvalsh(matrix_NN)


def _values_only(matrix_NN: jax.Array) -> jax.Array:
    """LAPACK's syevd without vectors, which `eigvalsh` computes and throws away: half the time.

    Only the diagonal and what is above it are read.
    """
    from jaxlib import lapack  # a private name: see `_has_values_only`

    num_rows = matrix_NN.shape[-1]
    call = jax.ffi.ffi_call(
        # Also loads LAPACK, without which the call would jump to address zero.
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
    """Whether this jaxlib has the calls by these names and gives right values: a private name may go."""
    probe = np.array([[2.0, 1.0], [1.0, 2.0]])
    try:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            found = [
                np.asarray(_values_only(jnp.asarray(probe, dtype)))
                for dtype in (np.float32, np.float64)
            ]
    except Exception:
        # Whatever an unknown target or signature raises: the public call does the same, only slower.
        return False
    return all(np.allclose(values, [1.0, 3.0], rtol=1e-5) for values in found)


@_loop_on_cpu
def cholesky_factor(matrix_NN: jax.Array) -> jax.Array:
    """Lower L [N, N] with L L^T = matrix, which is symmetric; NaN where it is not positive definite."""
    return jax.lax.linalg.cholesky(matrix_NN, symmetrize_input=False)
