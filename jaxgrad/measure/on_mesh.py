"""`measure.measure_batch` on a mesh: forward and backward split by the compiler, the reduction by hand.

Where weights are whole (D x 1) every device runs the program of one device on its own examples.

Otherwise the compiler splits the forward and the backward pass, from where parameters and batch lie
(`sharding`): its layout for a layer is the one of two sums. It cannot split a LAPACK call, and would run
every reduction on every device, so the reduction stands in a `shard_map`: an all-to-all gives each device
whole factors of its own layers, in exchange for its part of the features of all layers. A device then
reduces B/D examples of L/M layers.

Every constraint and every `shard_map` stands outside the `vmap` over examples, with "data" named for
its axis. Inside, a constraint would say nothing of that axis, and the compiler would hold the examples
of all devices on each; `spmd_axis_name` is there so that one could be written all the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgrad.data.batches import ExampleArrays
from jaxgrad.gradients.factors import example_gradients
from jaxgrad.measure.one_device import measure_example
from jaxgrad.measure.reducers import all_layers_reducers
from jaxgrad.measure.reduction import (
    Measured,
    reduce_all_layers,
    reduce_matrices,
    reduce_shared_input,
    shared_inputs,
    take_layers,
    with_columns,
)
from jaxgrad.models.sharding import DATA, MODEL, divided, shape_of
from jaxgrad.options import MeasureSettings

KV = ("k", "v")


@functools.partial(jax.jit, static_argnames=("graphdef", "settings", "mesh"))
def measure_batch_on(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: ExampleArrays,
    settings: MeasureSettings,
    mesh: Mesh,
) -> tuple[jax.Array, Measured]:
    """Loss [B] and statistics [B, P, ...] of a batch, the examples split over "data".

    Args:
        graphdef: the decoder without its weights.
        state: its weights, where `parameter_shardings` has them.
        batch: B is a multiple of the devices of "data".
        settings: what is measured.
        mesh: where.

    Returns:
        P is the number of selected layers, filled up to a multiple of the devices of "model" with
        layers of zeros, which the caller cuts off: a collective behind the reduction would have all
        devices wait for the slowest.

    Raises:
        ValueError: `layerwise` with weights that are split: it has one layer at a time.
    """
    if shape_of(mesh).model == 1:
        alone = jax.shard_map(
            lambda state, batch: jax.vmap(lambda e: measure_example(graphdef, state, e, settings))(
                batch
            ),
            mesh=mesh,
            in_specs=(P(), P(DATA)),
            out_specs=P(DATA),
            check_vma=False,
        )
        with jax.default_matmul_precision(settings.precision):
            return alone(state, batch)
    if settings.layerwise:
        raise ValueError("layers are reduced one by one only where the weights are whole")
    with jax.default_matmul_precision(settings.precision):
        return _measure_split(graphdef, state, batch, settings, mesh)


def _measure_split(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: ExampleArrays,
    settings: MeasureSettings,
    mesh: Mesh,
) -> tuple[jax.Array, Measured]:
    names = settings.selection.names
    loss_B, factors, matrices = jax.vmap(
        lambda example: example_gradients(
            graphdef, state, example, names, loss=settings.loss, matrices=settings.method == "dense"
        ),
        spmd_axis_name=DATA,
    )(batch)
    # Attention may leave the gradients of whole kv heads on a part of the devices; from there the way to
    # layers would be one that the compiler warns of.
    if not divided(nnx.merge(graphdef, state, copy=True).config, shape_of(mesh).model)["kv_heads"]:
        for name in [name for name in KV if name in factors]:
            pair = factors[name]
            factors[name] = pair._replace(output_grad_LTO=_whole(pair.output_grad_LTO, mesh))
            matrices |= {name: _whole(matrices[name], mesh)} if matrices else {}
    statistics: Measured = {}
    if settings.method == "dense":
        for name in names:
            layers = settings.selection[name]
            operands = (matrices[name], factors[name])
            statistics[name] = _by_layers(
                lambda chosen: reduce_matrices(chosen[0], chosen[1], settings),
                operands,
                layers,
                mesh,
            )
    else:
        for names_of_input in shared_inputs(settings.selection):
            layers = settings.selection[names_of_input[0]]
            grads = {name: factors[name].output_grad_LTO for name in names_of_input}
            statistics |= _by_layers(
                lambda chosen: reduce_shared_input(chosen[0], chosen[1], settings),
                (factors[names_of_input[0]].input_LTI, grads),
                layers,
                mesh,
            )
    if all_layers_reducers(settings):
        # All layers at once: each device of "model" has whole factors of all, and does the same work.
        together = jax.shard_map(
            jax.vmap(lambda pairs, given: reduce_all_layers(pairs, given, settings)),
            mesh=mesh,
            in_specs=P(DATA),
            out_specs=P(DATA),
            check_vma=False,
        )
        statistics = with_columns(statistics, together(factors, matrices))
    return loss_B, {name: statistics[name] for name in names}


def _whole(array_B: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(array_B, NamedSharding(mesh, P(DATA)))


def _by_layers(
    function: Callable[[Any], Any], operands: Any, layers: tuple[int, ...], mesh: Mesh
) -> Any:
    """`function` of one example's operands [L, ...], examples over "data", layers over "model"."""
    missing = -len(layers) % shape_of(mesh).model

    def chosen(array_BL: jax.Array) -> jax.Array:
        picked = jax.vmap(lambda array_L: take_layers(array_L, layers))(array_BL)
        return jnp.pad(picked, ((0, 0), (0, missing), *[(0, 0)] * (picked.ndim - 2)))

    spread = jax.shard_map(
        jax.vmap(function),
        mesh=mesh,
        in_specs=P(DATA, MODEL),
        out_specs=P(DATA, MODEL),
        check_vma=False,
    )
    return spread(jax.tree.map(chosen, operands))
