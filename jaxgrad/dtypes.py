"""Numeric policy in one place: the dtypes a model may have, and the least that a sum may have."""

from typing import Any

import jax.numpy as jnp

DTYPES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float64": jnp.float64,
}


def at_least_float32(dtype: Any) -> Any:
    """float32, or float64 for float64: the dtype of norms, softmax, rope, loss and factorizations."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
