"""Singular values of G = D^T X from its factors, and the choice of the algorithm.

| algorithm | steps | largest relative error seen (nuclear norm, effective rank) |
|---|---|---|
| qr | QR of X^T and D^T, SVD of the T x T core R_D R_X^T | 3e-7, 5e-6 in float32 |
| gram | float64: X X^T = L L^T, eigenvalues of L^T (D D^T) L | 2e-7, 3e-6 |
| build | build G, SVD | 9e-7, 1e-5 in float32; 600 equal tokens: 1.4e-5, 2e-4 |
| build_gram | build G in float64, eigenvalues of its smaller Gram matrix | 2e-7, 4e-6; 1.1e-6, 2.1e-5 |
| jacobi | float32, by products of matrices (`block_jacobi`) | 1e-6, 1e-6; 3.7e-6, 6.9e-5 |

Errors are against float64 singular values, on real factors. `build` is for float64, `jacobi` for TPUs.
Float32 Gram matrices lose the tail of the spectrum (7e-3 on the nuclear norm) and are not offered.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxgrad.spectra.linalg import (
    cholesky_factor,
    singular_values,
    symmetric_eigenvalues,
    triangular_factor,
)
from jaxgrad.spectra.products import HIGHEST, congruent, gram_matrix, upper_product

Algorithm = Literal["qr", "gram", "build", "build_gram", "jacobi"]

# On a CPU a float64 Gram matrix is faster than a float32 QR from this width on (1.1 to 1.2 times at 1536
# and 4096, T = 256), and up to so many tokens (1.05 times at 192; at 256 the QR is 1.15 times faster).
CPU_GRAM_WIDTH = 1024
CPU_GRAM_TOKENS = 224


def choose_algorithm(
    num_tokens: int,
    num_out: int,
    num_in: int,
    *,
    backend: str,
    method: str = "auto",
    is_float64: bool = False,
) -> Algorithm:
    """The fastest accurate algorithm for one projection, by shape and backend.

    Args:
        num_tokens: T, rows of the factors, padding included.
        num_out: O, rows of G.
        num_in: I, columns of G.
        backend: "cpu", "gpu" or "tpu".
        method: "auto", or "factored" to never build G (on a TPU: unless T is beyond O and I).
        is_float64: whether the factors are float64. Then no Gram matrix is used: it squares, so in float64
            it keeps all digits of float32 factors, but only half of those of float64 ones.
    """
    if backend == "tpu" and not is_float64:
        # Its QR and SVD take minutes to compile for each shape, and it has no float64.
        return "jacobi"
    # What decides is fast float64: CPUs and data-centre GPUs have it.
    gram_is_faster = num_in >= CPU_GRAM_WIDTH or num_tokens <= CPU_GRAM_TOKENS
    prefers_gram = backend == "gpu" or (backend == "cpu" and gram_is_faster)
    prefers_gram = prefers_gram and not is_float64
    if method == "factored" or num_tokens <= min(num_out, num_in):
        return "gram" if prefers_gram else "qr"
    if is_float64:
        return "build"
    # A float32 SVD of the built matrix would be faster, but its smallest values are noise if many tokens
    # repeat (2e-4 on the effective rank).
    return "build_gram"


def prepare_input(input_TI: jax.Array, algorithm: Algorithm) -> jax.Array:
    """What projections with the same input share: R_X for "qr", L for "gram", X if G is built."""
    if algorithm == "qr":
        return triangular_factor(input_TI.T)
    if algorithm == "gram":
        gram_TT = gram_matrix(input_TI.astype(jnp.float64))
        # Repeated tokens give equal rows and a singular Gram matrix. `eps * trace` moves no eigenvalue by
        # more than float64 rounds the largest; `tiny` is for X = 0.
        eps, tiny = float(jnp.finfo(jnp.float64).eps), float(jnp.finfo(jnp.float64).tiny)
        shift = eps * jnp.trace(gram_TT) + tiny
        identity = jnp.eye(gram_TT.shape[-1], dtype=gram_TT.dtype)
        return cholesky_factor(gram_TT + shift * identity)
    return input_TI


def factored_values(
    prepared: jax.Array, output_grad_TO: jax.Array, algorithm: Algorithm
) -> jax.Array:
    """Singular values of D^T X, descending.

    Args:
        prepared: `prepare_input` of X with the same algorithm.
        output_grad_TO: D, scaled to entries near one, so that squares do not underflow.
        algorithm: how; see the module.

    Returns:
        [min(T, O, I)] for "qr", [min(O, I)] for "build" and "build_gram", [T] for "gram". Values beyond
        min(O, I) are rounding noise, which the caller cuts off.
    """
    if algorithm == "qr":
        return singular_values(upper_product(triangular_factor(output_grad_TO.T), prepared))
    if algorithm == "gram":
        return gram_values(congruent(prepared, gram_matrix(output_grad_TO.astype(jnp.float64))))
    if algorithm == "build":
        return singular_values(build_matrix(prepared, output_grad_TO))
    # Repeated tokens cancel: summed in float32, that costs up to 1.1e-5 of the nuclear norm.
    wide_OI = build_matrix(prepared.astype(jnp.float64), output_grad_TO.astype(jnp.float64))
    if wide_OI.shape[0] > wide_OI.shape[1]:
        wide_OI = wide_OI.T
    return gram_values(gram_matrix(wide_OI))


def build_matrix(input_TI: jax.Array, output_grad_TO: jax.Array) -> jax.Array:
    """G = D^T X [O, I] in the dtype of the factors, at full precision."""
    return jnp.einsum("to,ti->oi", output_grad_TO, input_TI, precision=HIGHEST)


def gram_values(gram_NN: jax.Array) -> jax.Array:
    """Square roots of a Gram matrix's eigenvalues, descending; negative ones (rounding) become 0."""
    return jnp.sqrt(jnp.maximum(symmetric_eigenvalues(gram_NN)[::-1], 0.0))
