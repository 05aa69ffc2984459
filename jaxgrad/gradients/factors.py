"""One example's weight gradients: as factors (X, D), or as matrices (the definition).

For a linear map Y = X W^T the gradient of one example's loss is G = D^T X, with X [T, I] the inputs
and D [T, O] the loss's derivative by the outputs. X is sown by the decoder and D is the gradient by a
zero added to the output (a tap), so a forward and a backward pass give both and no G is built.

Everything here is for one example; batches are `jax.vmap`'s job (see `measure`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgrad.data.batches import ExampleArrays
from jaxgrad.gradients.loss import LOSSES, Head
from jaxgrad.models.decoder import PROJECTIONS, Decoder


class Factors(NamedTuple):
    """Factors of one projection's gradients: G = output_grad^T input, a layer at a time."""

    input_LTI: jax.Array
    output_grad_LTO: jax.Array


def value_at(state: nnx.State, path: tuple[str, ...]) -> jax.Array:
    """The array at a path."""
    node: Any = state
    for name in path:
        node = node[name]
    return node.get_value()


def num_live_tokens(example: ExampleArrays) -> jax.Array:
    """Tokens without padding: a response ends its sequence, and its last token is only a target."""
    return jnp.max(example.positions_S) + 2


def _tap_zeros(
    graphdef: nnx.GraphDef, state: nnx.State, example: ExampleArrays, names: tuple[str, ...]
) -> nnx.State:
    """A zero for the output of each named projection, in the shape that a forward pass gives it."""

    def forward(state: nnx.State, example: ExampleArrays) -> nnx.State:
        # copy=True: the captures are stored on the module, so it must be this trace's own.
        model = nnx.merge(graphdef, state, copy=True)
        run = nnx.capture(model, nnx.Perturbation)
        return run(example.tokens_T, example.positions_S, num_live_tokens(example))[1]

    shapes = jax.eval_shape(forward, state, example)
    return zeros_at(shapes, {(*PROJECTIONS[name].module, "output") for name in names})


def zeros_at(shapes: nnx.State, paths: set[tuple[str, ...]]) -> nnx.State:
    """Zeros for the entries of `shapes` at these paths."""
    taps = [(path, leaf) for path, leaf in nnx.to_flat_state(shapes) if path in paths]
    zeros = [(path, leaf.replace(jnp.zeros(leaf.shape, leaf.dtype))) for path, leaf in taps]
    return nnx.from_flat_state(zeros)


def example_gradients(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    example: ExampleArrays,
    names: tuple[str, ...],
    *,
    loss: str = "response_mean",
    matrices: bool = False,
) -> tuple[jax.Array, dict[str, Factors], dict[str, jax.Array]]:
    """Loss and gradients of one example, in one forward and one backward pass.

    Args:
        graphdef: the decoder without its weights.
        state: its weights.
        example: tokens_T, positions_S, labels_S int32; weights_S float.
        names: projections to measure.
        loss: a name in `LOSSES`.
        matrices: also differentiate by the weights themselves (method `dense`, the definition). The
            taps ride along, because the rank bound counts the tokens that have a gradient.

    Returns:
        The loss (scalar, at least float32).
        For each name the `Factors` over all layers (a leading axis of one for `lm_head`, whose T are
        the response positions), in the model's dtype. Projections that share an input share its array.
        For each name the gradient [L, O, I]; empty without `matrices`.
    """
    taps = _tap_zeros(graphdef, state, example, names)
    paths = {(*PROJECTIONS[name].module, "weight") for name in names} if matrices else set()
    flat = nnx.to_flat_state(state)
    chosen = nnx.from_flat_state([(path, leaf) for path, leaf in flat if path in paths])
    rest = nnx.from_flat_state([(path, leaf) for path, leaf in flat if path not in paths])

    take_loss = LOSSES[loss].function

    def forward(model: Decoder) -> jax.Array:
        x_SD = model.hidden(example.tokens_T, example.positions_S, num_live_tokens(example))
        return take_loss(Head(model.logits, "lm_head" in names), x_SD, example)

    def run_loss(chosen: nnx.State, taps: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, chosen, rest, copy=True)
        run = nnx.capture(forward, nnx.Intermediate, init=taps)
        return run(model)

    differentiate = jax.value_and_grad(run_loss, argnums=(0, 1), has_aux=True)
    (value, captured), (by_weight, by_tap) = differentiate(chosen, taps)

    def pick(state: nnx.State, path: tuple[str, ...], stacked: bool) -> jax.Array:
        array = value_at(state, path)
        return array if stacked else array[None]

    sites = {name: PROJECTIONS[name] for name in names}
    factors = {
        name: Factors(
            pick(captured, site.input, site.stacked),
            pick(by_tap, (*site.module, "output"), site.stacked),
        )
        for name, site in sites.items()
    }
    dense = {
        name: pick(by_weight, (*site.module, "weight"), site.stacked)
        for name, site in sites.items()
        if matrices
    }
    return value, factors, dense
