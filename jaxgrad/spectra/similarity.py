"""Cosines between gradients of one example, from their factors, a few rows of G at a time.

For gradients G and H, flattened row by row as PyTorch stores them, the similarity is
<vec G, vec H> / (|G| |H|) (arXiv 2504.10766, section 3.3): between the layers of one projection, and in a
layer between q and o and between k and v.

| case | result |
|---|---|
| a gradient is zero or not finite | NaN for every cosine with it |
| q and o have different shapes | their flat vectors have the same length and are compared entry by entry |
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxgrad.dtypes import at_least_float32
from jaxgrad.projections import PARTNERS
from jaxgrad.spectra.products import HIGHEST, gram_matrix
from jaxgrad.spectra.statistics import Columns, scale_to_one
from jaxgrad.spectra.target import target

TILE_ROWS = 128  # rows of each gradient in memory at a time


def similarities(
    factors: Mapping[str, tuple[jax.Array, jax.Array]], layers: dict[str, tuple[int, ...]]
) -> dict[str, Columns]:
    """Projection -> the columns `SIMILARITIES` of its gradients, at least float32.

    `partner_cosine` [L] is NaN without a partner; `layer_cosines` is [L, L].

    Args:
        factors: projection -> inputs [L, T, I] and output gradients [L, T, O] of its layers.
        layers: projection -> the indices of these layers. Partners are compared if theirs are the same.
    """
    scaled = {
        name: (_wide_enough(input_LTI), jax.vmap(_unit_size)(grad_LTO))
        for name, (input_LTI, grad_LTO) in factors.items()
    }
    grams = {name: _layer_gram(*pair) for name, pair in scaled.items()}

    def inner(name: str, partner: str) -> jax.Array:
        operands = (*scaled[name], *scaled[partner])
        return jax.lax.map(lambda layer: _flat_inner(*layer), operands)

    return _cosines(grams, inner, layers)


def matrix_similarities(
    matrices: dict[str, jax.Array], layers: dict[str, tuple[int, ...]]
) -> dict[str, Columns]:
    """The same columns from the gradients [L, O, I] themselves: the definition."""
    flat = {
        name: jax.vmap(lambda matrix: _unit_size(matrix).reshape(-1))(matrix_LOI)
        for name, matrix_LOI in matrices.items()
    }
    grams = {name: gram_matrix(x_LK) for name, x_LK in flat.items()}
    return _cosines(grams, lambda name, other: jnp.sum(flat[name] * flat[other], axis=1), layers)


def _cosines(
    grams: dict[str, jax.Array],
    inner: Callable[[str, str], jax.Array],
    layers: dict[str, tuple[int, ...]],
) -> dict[str, Columns]:
    """The columns, from inner products.

    A cosine with a zero gradient is 0 / 0 = NaN, which is right: it is undefined.

    Args:
        grams: projection -> inner products of its layers [L, L].
        inner: (projection, partner) -> inner products of the two in each layer [L].
        layers: see `similarities`.
    """
    norms = {name: jnp.sqrt(jnp.diagonal(gram_LL)) for name, gram_LL in grams.items()}
    found: dict[str, Columns] = {}
    for name, gram_LL in grams.items():
        norm_L, partner = norms[name], PARTNERS.get(name)
        partner_L = jnp.full_like(norm_L, jnp.nan)
        if partner in found:
            partner_L = found[partner]["partner_cosine"]
        elif partner in grams and layers[name] == layers[partner]:
            partner_L = inner(name, partner) / (norm_L * norms[partner])
        found[name] = {
            "partner_cosine": partner_L,
            "layer_cosines": gram_LL / (norm_L[:, None] * norm_L[None, :]),
        }
    return found


def _wide_enough(array: jax.Array) -> jax.Array:
    return array.astype(at_least_float32(array.dtype))


def _unit_size(array: jax.Array) -> jax.Array:
    """Scaled by a power of two to entries near 1: squares do not underflow, cosines do not change."""
    return scale_to_one(_wide_enough(array))[0]


def _layer_gram(input_LTI: jax.Array, grad_LTO: jax.Array) -> jax.Array:
    """Inner products <G_l, G_m> [L, L], summed over tiles of the gradients' rows."""
    num_layers, num_tokens, num_out = grad_LTO.shape
    tile = min(TILE_ROWS, num_out)
    num_tiles = -(-num_out // tile)
    # Columns of zeros in D are rows of zeros in G.
    padded = jnp.pad(grad_LTO, ((0, 0), (0, 0), (0, num_tiles * tile - num_out)))
    tiles_CLTO = padded.reshape(num_layers, num_tokens, num_tiles, tile).transpose(2, 0, 1, 3)

    def add(gram_LL: jax.Array, tile_LTO: jax.Array) -> tuple[jax.Array, None]:
        rows_LOI = jnp.einsum("lto,lti->loi", tile_LTO, input_LTI, precision=HIGHEST)
        part_LL = jnp.einsum("loi,moi->lm", rows_LOI, rows_LOI, precision=HIGHEST)
        return gram_LL + part_LL.astype(gram_LL.dtype), None

    wide = jax.dtypes.canonicalize_dtype(jnp.float64)
    return jax.lax.scan(add, jnp.zeros((num_layers, num_layers), wide), tiles_CLTO)[0]


def _flat_inner(
    input_TI: jax.Array, grad_TO: jax.Array, other_input_TI: jax.Array, other_grad_TO: jax.Array
) -> jax.Array:
    """<vec G, vec H> for G [O, I] and H [M, J] with O I = M J, flattened row by row.

    With g = gcd(I, J), J / g rows of G have as many entries as I / g rows of H: this is the unit.
    """
    num_in, num_other_in = input_TI.shape[-1], other_input_TI.shape[-1]
    shared = math.gcd(num_in, num_other_in)
    unit, other_unit = num_other_in // shared, num_in // shared
    num_units = grad_TO.shape[-1] // unit
    # The largest number of units per tile that divides all units and stays within `TILE_ROWS`.
    fits = [n for n in range(1, num_units + 1) if num_units % n == 0 and n * unit <= TILE_ROWS]
    per_tile = max(fits, default=1)

    def tiles(grad_TO: jax.Array, rows: int) -> jax.Array:
        return grad_TO.reshape(grad_TO.shape[0], -1, rows).swapaxes(0, 1)

    def part(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = jnp.matmul(operands[0].T, input_TI, precision=HIGHEST).reshape(-1)
        other_rows = jnp.matmul(operands[1].T, other_input_TI, precision=HIGHEST).reshape(-1)
        wide = jax.dtypes.canonicalize_dtype(jnp.float64)
        if target() == "tpu":  # which emulates float64
            return jnp.sum(rows * other_rows).astype(wide)
        return jnp.sum((rows * other_rows).astype(wide))

    pairs = (tiles(grad_TO, per_tile * unit), tiles(other_grad_TO, per_tile * other_unit))
    return jnp.sum(jax.lax.map(part, pairs))
