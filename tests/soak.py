"""Batches of mixed lengths through all projections, in a process of its own (see test_soak.py).

Usage: soak.py [number of batches]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from decoder_configs import tiny_config

from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.programs import Programs
from jaxgrad.models.decoder import abstract_decoder
from jaxgrad.options import MeasureSettings

CONFIG = tiny_config(
    vocab_size=211,
    width=96,
    mlp_width=160,
    num_layers=2,
    num_heads=6,
    head_size=16,
    max_positions=256,
)
# Around every threshold: T below and above the short sides 32 (k, v) and 96 (q, o, gate, up, down).
SHAPES = [
    BatchShape(3, 24, 16),
    BatchShape(2, 40, 16),
    BatchShape(2, 80, 32),
    BatchShape(1, 112, 64),
    BatchShape(1, 160, 160),
]


def main(num_batches: int) -> None:
    rng = np.random.default_rng(0)
    _, abstract = abstract_decoder(CONFIG, jnp.float32)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 8, jnp.float32), abstract
    )
    settings = MeasureSettings(select_parameters(CONFIG, "all"))
    programs = Programs(CONFIG, "float32", settings)

    def measure(index: int) -> None:
        rng = np.random.default_rng(index)
        shape = SHAPES[rng.integers(len(SHAPES))]
        B, T, S = shape.num_examples, shape.num_tokens, shape.num_responses
        used = rng.integers(1, S)
        weights_BS = np.zeros((B, S), np.float64)
        weights_BS[:, :used] = 1 / used
        arrays = ExampleArrays(
            rng.integers(0, CONFIG.vocab_size, (B, T), np.int32),
            np.tile(np.arange(S, dtype=np.int32) + max(T - S - 1, 0), (B, 1)),
            rng.integers(0, CONFIG.vocab_size, (B, S), np.int32),
            weights_BS,
        )
        loss_B, measured = programs.measure(state, shape, arrays)
        norms = [columns["nuclear_norm"] for columns in measured.values()]
        assert np.isfinite(loss_B).all() and all(np.isfinite(norm).all() for norm in norms)
        assert all((norm > 0).all() for norm in norms)

    # Two in flight, as a run has them.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for index, _ in enumerate(pool.map(measure, range(num_batches))):
            if index % 50 == 49:
                print(f"{index + 1} batches", flush=True)
    print(f"done {num_batches} batches, {programs.tally.shapes} shapes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
