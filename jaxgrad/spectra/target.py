"""The kind of device that a program is traced for.

It decides how a spectrum is taken, and need not be the device at hand: programs for a TPU are compiled on a
machine without one. `compiled_for` stands around a trace, as `jax.default_matmul_precision` does, with
`MeasureSettings.backend`, so that it is part of the key by which JAX keeps a trace.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(backend: str) -> Iterator[None]:
    """Traces inside are for a "cpu", "gpu" or "tpu"."""
    token = _TARGET.set(backend)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> str:
    """What is traced for; outside `compiled_for` this process's backend."""
    return _TARGET.get() or jax.default_backend()
