"""One example's weight gradients: as factors (X, D), or as matrices (the definition).

For a linear map Y = X W^T the gradient of one example's loss is G = D^T X, with X [T, I] the inputs
and D [T, O] the loss's derivative by the outputs. X is sown by the decoder and D is the gradient by a
zero added to the output (a tap), so a forward and a backward pass give both and no G is built.

Everything here is for one example; batches are `jax.vmap`'s job (see `measure`).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgrad.dtypes import at_least_float32
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import PROJECTIONS, Decoder, projections_of

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
# Response positions whose logits are made at a time: enough rows for a product at full speed, few enough
# for the logits of a large vocabulary to stay in a processor's cache (49152 x 64 x 4 bytes = 12 MB).
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which weights are measured: projection name -> its layers, ascending; (0,) for `lm_head`."""

    layers: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The projections, in the decoder's order."""
        return tuple(name for name, _ in self.layers)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return dict(self.layers)[name]

    @property
    def num_matrices(self) -> int:
        """Matrices an example."""
        return sum(len(layers) for _, layers in self.layers)


def parameter_names(config: DecoderConfig) -> dict[str, tuple[str, int]]:
    """Name of every measurable weight -> (projection, layer), in the decoder's order.

    The names are Llama's for every family, also where a checkpoint holds several fused in one weight.
    """
    blocks = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
    present = projections_of(config)
    names = {
        f"model.layers.{layer}.{block}.{projection}_proj.weight": (projection, layer)
        for projection, block in blocks.items()
        if projection in present
        for layer in range(config.num_layers)
    }
    if "lm_head" in present:
        names["lm_head.weight"] = ("lm_head", 0)
    return names


def select_parameters(config: DecoderConfig, parameters: str) -> Selection:
    """Resolve --parameters: "attention", "mlp", "all", or a regular expression on the weights' names.

    Raises:
        UserError: the expression is broken, or matches nothing.
    """
    names = parameter_names(config)
    groups = {"attention": ATTENTION, "mlp": MLP, "all": tuple(PROJECTIONS)}
    if parameters in groups:
        chosen = [place for place in names.values() if place[0] in groups[parameters]]
    else:
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise UserError(
                f"--parameters {parameters!r} is not a regular expression: {error}"
            ) from error
        chosen = [place for name, place in names.items() if pattern.search(name)]
        if not chosen:
            first, last = next(iter(names)), list(names)[-1]
            raise UserError(
                f"--parameters {parameters!r} matches none of the {len(names)} weights "
                f"({first} ... {last}); give attention, mlp, all, or a regular expression on these names"
            )
    layers: dict[str, tuple[int, ...]] = {}
    for projection, layer in chosen:
        layers[projection] = (*layers.get(projection, ()), layer)
    return Selection(tuple(layers.items()))


class ExampleArrays(NamedTuple):
    """One example's (or, with a leading B, one batch's) arrays; see `batches.BatchArrays`."""

    tokens_T: jax.Array
    positions_S: jax.Array
    labels_S: jax.Array
    weights_S: jax.Array


class Factors(NamedTuple):
    """Factors of one projection's gradients: G = output_grad^T input, a layer at a time."""

    input_LTI: jax.Array
    output_grad_LTO: jax.Array


def response_loss(logits_SV: jax.Array, labels_S: jax.Array, weights_S: jax.Array) -> jax.Array:
    """Mean over response tokens of -log p(token given all before it), at least float32.

    `weights_S` holds 1 / (response tokens) at response positions and 0 at padding.
    """
    logits_SV = logits_SV.astype(at_least_float32(logits_SV.dtype))
    nll_S = optax.softmax_cross_entropy_with_integer_labels(logits_SV, labels_S)
    return jnp.sum(nll_S * weights_S.astype(nll_S.dtype))


def chunked_response_loss(
    head: Callable[[jax.Array], jax.Array], x_SD: jax.Array, example: ExampleArrays
) -> jax.Array:
    """`response_loss` of `head(x_SD)`, a chunk of positions at a time.

    The logits of a long response are the largest array of the whole pass; here no more than
    `CHUNK` rows of them exist, and chunks of nothing but padding are not computed at all. The
    derivative by `x_SD` is taken in the same loop, so the logits are made once. The head's own weights
    are constants to it.

    Args:
        head: rows [C, D] -> logits [C, V].
        x_SD: what the head takes at `example.positions_S`.
        example: its targets stand first, padding behind them.
    """
    num_positions = x_SD.shape[0]
    padding = -num_positions % CHUNK
    labels_S = jnp.pad(example.labels_S, (0, padding))
    weights_S = jnp.pad(example.weights_S, (0, padding))
    num_chunks = -(-jnp.sum(weights_S > 0, dtype=jnp.int32) // CHUNK)

    def chunk_loss(x_CD: jax.Array, start: jax.Array) -> jax.Array:
        labels_C, weights_C = (
            jax.lax.dynamic_slice_in_dim(array, start, CHUNK) for array in (labels_S, weights_S)
        )
        return response_loss(head(x_CD), labels_C, weights_C)

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


def head_loss(
    model: Decoder, x_SD: jax.Array, example: ExampleArrays, names: tuple[str, ...]
) -> jax.Array:
    """`response_loss` from what the head takes; in chunks where that is more than one.

    Where the head's own gradient is among `names`, its factors are those of all positions at once.
    """
    if "lm_head" not in names and x_SD.shape[0] > CHUNK:
        return chunked_response_loss(model.logits, x_SD, example)
    return response_loss(model.logits(x_SD), example.labels_S, example.weights_S)


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
    matrices: bool = False,
) -> tuple[jax.Array, dict[str, Factors], dict[str, jax.Array]]:
    """Loss and gradients of one example, in one forward and one backward pass.

    Args:
        graphdef: the decoder without its weights.
        state: its weights.
        example: tokens_T, positions_S, labels_S int32; weights_S float.
        names: projections to measure.
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

    def forward(model: Decoder) -> jax.Array:
        x_SD = model.hidden(example.tokens_T, example.positions_S, num_live_tokens(example))
        return head_loss(model, x_SD, example, names)

    def loss(chosen: nnx.State, taps: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, chosen, rest, copy=True)
        run = nnx.capture(forward, nnx.Intermediate, init=taps)
        return run(model)

    differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, captured), (by_weight, by_tap) = differentiate(chosen, taps)

    def pick(state: nnx.State, path: tuple[str, ...], stacked: bool) -> jax.Array:
        array = value_at(state, path)
        return array if stacked else array[None]

    places = {name: PROJECTIONS[name] for name in names}
    factors = {
        name: Factors(
            pick(captured, place.input, place.stacked),
            pick(by_tap, (*place.module, "output"), place.stacked),
        )
        for name, place in places.items()
    }
    dense = {
        name: pick(by_weight, (*place.module, "weight"), place.stacked)
        for name, place in places.items()
        if matrices
    }
    return value, factors, dense


def to_example_arrays(tokens: Any, positions: Any, labels: Any, weights: Any) -> ExampleArrays:
    """NumPy arrays of one example or one batch as device arrays, dtypes as `ExampleArrays` needs."""
    return ExampleArrays(
        jnp.asarray(np.asarray(tokens, np.int32)),
        jnp.asarray(np.asarray(positions, np.int32)),
        jnp.asarray(np.asarray(labels, np.int32)),
        jnp.asarray(np.asarray(weights, np.float64)),
    )
