"""LAPACK calls that cannot deadlock.

A batched LAPACK call in jaxlib 0.10.0 to 0.11.0 splits its batch over XLA's CPU thread pool and blocks
a worker while it waits; two such calls in flight in one jit can fill the pool and hang for ever
(jax#36927). So on the CPU every call is unbatched: under `jax.vmap` it becomes a loop, which costs
nothing measurable, because the batch gained nothing from threads. Other backends keep the batched call.

Shapes are [..., rows, cols] of one float dtype; all functions are traceable.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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
    """Eigenvalues [N] of a symmetric matrix, ascending."""
    return jnp.linalg.eigvalsh(matrix_NN)


@_loop_on_cpu
def cholesky_factor(matrix_NN: jax.Array) -> jax.Array:
    """Lower L [N, N] with L L^T = matrix; NaN where it is not positive definite."""
    return jax.lax.linalg.cholesky(matrix_NN)
