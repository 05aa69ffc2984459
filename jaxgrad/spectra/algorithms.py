"""Singular values of G = D^T X from its factors, and which algorithm to take where.

| algorithm | what it does | largest relative error seen (nuclear norm, effective rank) |
|---|---|---|
| qr | QR of X^T and D^T, values of the T x T core R_D R_X^T | 3e-7, 5e-6 in float32 |
| gram | float64: X X^T = L L^T, eigenvalues of L^T (D D^T) L | 2e-7, 3e-6 |
| build | G itself, values on its short side | 9e-7, 1e-5 in float32; 600 equal tokens: 1.4e-5, 2e-4 |
| build_gram | G in float64, eigenvalues of its Gram matrix on the short side | 2e-7, 4e-6; 1.1e-6, 2.1e-5 |

The errors are against float64 singular values, on real factors. `build` is for float64 and for TPUs.
Float32 Gram matrices lose the tail (7e-3 on the nuclear norm) and are not offered.
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

Algorithm = Literal["qr", "gram", "build", "build_gram"]

# Where the float64 Gram matrix beats a float32 QR on a CPU: from this width on (1.1 to 1.2 times at 1536
# and 4096, T = 256), and up to so many tokens (1.05 times at 192; the QR is 1.15 times faster at 256).
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
    """The algorithm for one projection, by shape and backend.

    Args:
        num_tokens: T, rows of the factors, padding included.
        num_out: O, rows of G.
        num_in: I, columns of G.
        backend: "cpu", "gpu" or "tpu".
        method: "auto", or "factored" for never building G.
        is_float64: whether the factors are float64. A Gram matrix squares, so a float64 one keeps all
            digits of float32 factors, but half of those of float64 ones: there none is used.
    """
    # Fast float64 is what decides: CPUs and data-centre GPUs have it, TPUs emulate it.
    gram_is_faster = num_in >= CPU_GRAM_WIDTH or num_tokens <= CPU_GRAM_TOKENS
    prefers_gram = backend == "gpu" or (backend == "cpu" and gram_is_faster)
    prefers_gram = prefers_gram and not is_float64
    if method == "factored" or num_tokens <= min(num_out, num_in):
        return "gram" if prefers_gram else "qr"
    if is_float64 or backend == "tpu":
        return "build"
    # A float32 SVD of the built matrix would be faster still, but its smallest values are noise where many
    # tokens repeat (2e-4 on the effective rank).
    return "build_gram"


def prepare_input(input_TI: jax.Array, algorithm: Algorithm) -> jax.Array:
    """What all projections with this input share: R_X, or L, or X itself when G is built."""
    if algorithm == "qr":
        return triangular_factor(input_TI.T)
    if algorithm == "gram":
        gram_TT = gram_matrix(input_TI.astype(jnp.float64))
        # A repeated token gives equal rows and a singular Gram matrix. The shift moves no eigenvalue
        # by more than float64's own rounding of the largest; the tiny one keeps zero rows positive.
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
        output_grad_TO: D, scaled so that its entries are near one (squares must not underflow).
        algorithm: one of the table's.

    Returns:
        [min(T, O, I)] for "qr", [min(O, I)] for "build" and "build_gram", [T] for "gram" (T may exceed
        min(O, I); the surplus is rounding noise, which the caller's rank bound removes).
    """
    if algorithm == "qr":
        return singular_values(upper_product(triangular_factor(output_grad_TO.T), prepared))
    if algorithm == "gram":
        return gram_values(congruent(prepared, gram_matrix(output_grad_TO.astype(jnp.float64))))
    if algorithm == "build":
        return singular_values(build_matrix(prepared, output_grad_TO))
    # Rows of repeated tokens cancel: summed in float32 they cost up to 1.1e-5 of the nuclear norm.
    wide_OI = build_matrix(prepared.astype(jnp.float64), output_grad_TO.astype(jnp.float64))
    if wide_OI.shape[0] > wide_OI.shape[1]:
        wide_OI = wide_OI.T
    return gram_values(gram_matrix(wide_OI))


def build_matrix(input_TI: jax.Array, output_grad_TO: jax.Array) -> jax.Array:
    """G = D^T X [O, I], the products in the dtype of the factors, at full precision."""
    return jnp.einsum("to,ti->oi", output_grad_TO, input_TI, precision=HIGHEST)


def gram_values(gram_NN: jax.Array) -> jax.Array:
    """Square roots of a Gram matrix's eigenvalues, descending; negative rounding noise is zero."""
    return jnp.sqrt(jnp.maximum(symmetric_eigenvalues(gram_NN)[::-1], 0.0))
