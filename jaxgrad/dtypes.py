"""Numeric policy: the dtypes that a model may have, and the smallest dtype of sums."""

from typing import Any

import jax.numpy as jnp

# By the names in `options.DTYPE_NAMES`, a list that needs no JAX.
DTYPES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float64": jnp.float64,
}


def at_least_float32(dtype: Any) -> Any:
    """float64 for float64, else float32: the dtype of norms, softmax, rope, loss and factorizations."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
