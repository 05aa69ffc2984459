"""Losses: from what the head takes to the scalar that is differentiated.

A loss is a function (head, x_SD, example) -> scalar, in at least float32. `LOSSES` declares them by name;
`--loss` chooses one. Every path of the program takes its loss from there: by factors, layer by layer,
dense and on a mesh. The reference has formulas of its own (`reference.losses`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.data.batches import ExampleArrays
from jaxgrad.dtypes import at_least_float32
from jaxgrad.errors import UserError

# Response positions whose logits are made at a time: enough rows for a product at full speed, few enough
# for the logits of a large vocabulary to stay in a processor's cache (49152 x 64 x 4 bytes = 12 MB).
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Head:
    """The decoder's last map, as a loss takes it: rows [C, D] -> logits [C, V].

    Attributes:
        logits: the map.
        is_measured: its own gradient is wanted. Then all rows have to go through it in one call, because
            the factors of that gradient are those of all positions at once.
    """

    logits: Callable[[jax.Array], jax.Array]
    is_measured: bool = False

    def __call__(self, x_CD: jax.Array) -> jax.Array:
        """[C, D] -> [C, V]."""
        return self.logits(x_CD)


Loss = Callable[[Head, jax.Array, ExampleArrays], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossDefinition:
    """A loss that --loss can name.

    Attributes:
        name: in flags, options and run.json.
        function: (head, x_SD, example) -> scalar.
        unit: of the column `loss`.
        definition: one line for people.
        source: who defined it.
    """

    name: str
    function: Loss
    unit: str
    definition: str
    source: str


def response_mean(head: Head, x_SD: jax.Array, example: ExampleArrays) -> jax.Array:
    """Mean over response tokens of -log p(token given all before it)."""
    return cross_entropy(head, x_SD, example.labels_S, example.weights_S)


def response_sum(head: Head, x_SD: jax.Array, example: ExampleArrays) -> jax.Array:
    """Sum over response tokens of -log p(token given all before it)."""
    is_response_S = (example.weights_S > 0).astype(example.weights_S.dtype)
    return cross_entropy(head, x_SD, example.labels_S, is_response_S)


LOSSES: dict[str, LossDefinition] = {
    loss.name: loss
    for loss in (
        LossDefinition(
            "response_mean",
            response_mean,
            "nats a token",
            "mean over response tokens of -log p(token given all before it)",
            "arXiv 2410.23743",
        ),
        LossDefinition(
            "response_sum",
            response_sum,
            "nats",
            "sum over response tokens of -log p(token given all before it)",
            "jaxgrad",
        ),
    )
}


def find_loss(name: str) -> LossDefinition:
    """The loss of that name.

    Raises:
        UserError: there is none.
    """
    if name not in LOSSES:
        raise UserError(f"--loss={name} is unknown; there are {', '.join(LOSSES)}")
    return LOSSES[name]


def cross_entropy(
    head: Head, x_SD: jax.Array, labels_S: jax.Array, weights_S: jax.Array
) -> jax.Array:
    """Sum over positions of weight times -log p(label), at least float32.

    More than `CHUNK` positions go through the head in chunks, unless its own gradient is measured.

    Args:
        head: makes the logits.
        x_SD: what the head takes at each position.
        labels_S: the token to predict, int32.
        weights_S: exactly 0 at padding, which stands behind all other positions.
    """
    if head.is_measured or x_SD.shape[0] <= CHUNK:
        return _weighted_nll(head(x_SD), labels_S, weights_S)
    return _cross_entropy_in_chunks(head, x_SD, labels_S, weights_S)


def _weighted_nll(logits_SV: jax.Array, labels_S: jax.Array, weights_S: jax.Array) -> jax.Array:
    """Sum over positions of weight times -log p(label).

    -log p = softplus(a), with a the log of the other tokens' odds: logsumexp of the other logits, minus the
    label's logit. Its derivative by the label's logit is minus the sum of those by the others. The usual
    softmax - onehot cancels where p is near 1: in float32 it is off by 0.7 % at a loss of 1e-6.
    """
    logits_SV = logits_SV.astype(at_least_float32(logits_SV.dtype))
    is_label_SV = labels_S[:, None] == jnp.arange(logits_SV.shape[1], dtype=labels_S.dtype)[None]
    others_S = jax.nn.logsumexp(jnp.where(is_label_SV, -jnp.inf, logits_SV), axis=1)
    label_S = jnp.sum(jnp.where(is_label_SV, logits_SV, 0), axis=1)
    return jnp.sum(jax.nn.softplus(others_S - label_S) * weights_S.astype(logits_SV.dtype))


def _cross_entropy_in_chunks(
    head: Head, x_SD: jax.Array, labels_S: jax.Array, weights_S: jax.Array
) -> jax.Array:
    """The same, `CHUNK` positions at a time.

    The logits of a long response are the largest array of the whole pass. Here no more than `CHUNK` rows
    of them exist, and chunks of nothing but padding are not computed. The derivative by `x_SD` is taken
    in the same loop, so the logits are made once. The head's own weights are constants.
    """
    num_positions = x_SD.shape[0]
    padding = -num_positions % CHUNK
    labels_S = jnp.pad(labels_S, (0, padding))
    weights_S = jnp.pad(weights_S, (0, padding))
    num_chunks = -(-jnp.sum(weights_S > 0, dtype=jnp.int32) // CHUNK)

    def chunk_loss(x_CD: jax.Array, start: jax.Array) -> jax.Array:
        labels_C, weights_C = (
            jax.lax.dynamic_slice_in_dim(array, start, CHUNK) for array in (labels_S, weights_S)
        )
        return _weighted_nll(head(x_CD), labels_C, weights_C)

    def loss_and_grad(x_SD: jax.Array) -> tuple[jax.Array, jax.Array]:
        padded_SD = jnp.pad(x_SD, ((0, padding), (0, 0)))

        def add_chunk(carry: Any) -> Any:
            index, total, grad_SD = carry
            start = index * CHUNK
            x_CD = jax.lax.dynamic_slice_in_dim(padded_SD, start, CHUNK)
            value, grad_CD = jax.value_and_grad(chunk_loss)(x_CD, start)
            grad_SD = jax.lax.dynamic_update_slice_in_dim(grad_SD, grad_CD, start, 0)
            return index + 1, total + value, grad_SD

        zero = jnp.zeros((), at_least_float32(x_SD.dtype))
        carry = (jnp.zeros((), jnp.int32), zero, jnp.zeros_like(padded_SD))
        _, total, grad_SD = jax.lax.while_loop(lambda c: c[0] < num_chunks, add_chunk, carry)
        return total, grad_SD[:num_positions]

    @jax.custom_vjp
    def loss(x_SD: jax.Array) -> jax.Array:
        return loss_and_grad(x_SD)[0]

    def backward(grad_SD: jax.Array, by_loss: jax.Array) -> tuple[jax.Array]:
        return ((grad_SD * by_loss).astype(grad_SD.dtype),)

    loss.defvjp(loss_and_grad, backward)
    return loss(x_SD)
