"""`one_device.measure_batch` on a mesh: the compiler splits the passes, a `shard_map` the reduction.

Where weights are whole (D x 1), every device runs the program of one device on its own examples.

Otherwise the compiler splits the forward and the backward pass, from where parameters and batch lie
(`models.sharding`). It picks the layout with two all-reduces per layer and pass. It cannot split a LAPACK
call, and would run every reduction on every device. So the reduction stands in a `shard_map`: an
all-to-all gives each device the whole factors of its own layers. Each device then reduces B/D examples of
L/M layers.

Constraints and `shard_map`s stand outside the `vmap` over examples, on arrays with their B. Inside it a
constraint would say nothing of B, and every device would hold all examples, unless the `vmap` has
`spmd_axis_name`.
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
from jaxgrad.gradients.factors import Factors, example_gradients
from jaxgrad.measure.one_device import measure_example
from jaxgrad.measure.reducers import all_layers_reducers
from jaxgrad.measure.reduction import (
    Measured,
    groups_at_once,
    paired,
    reduce_all_layers,
    reduce_groups,
    reduce_matrices,
    take_layers,
    with_columns,
)
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.models.sharding import DATA, MODEL, divided, parameter_specs, shape_of
from jaxgrad.options import MeasureSettings
from jaxgrad.spectra import compiled_for

KV = ("k", "v")


@functools.partial(jax.jit, static_argnames=("graphdef", "settings", "mesh"))
def measure_batch_on(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: ExampleArrays,
    settings: MeasureSettings,
    mesh: Mesh,
) -> tuple[jax.Array, Measured]:
    """Loss [B] and columns [B, padded L, ...] of a batch, the examples split over "data".

    Args:
        graphdef: the decoder without its weights.
        state: its weights, where `parameter_shardings` has them.
        batch: B is a multiple of the devices of "data".
        settings: what is measured.
        mesh: where.

    Returns:
        The selected layers are filled up with layers of zeros to a multiple of the devices of "model".
        The caller cuts these off: a collective behind the reduction would have all devices wait for the
        slowest.

    Raises:
        ValueError: `layerwise` with weights that are split: it has one layer at a time.
    """
    if shape_of(mesh).model == 1:
        whole_program = jax.shard_map(
            lambda state, batch: jax.vmap(lambda e: measure_example(graphdef, state, e, settings))(
                batch
            ),
            mesh=mesh,
            in_specs=(P(), P(DATA)),
            out_specs=P(DATA),
            check_vma=False,
        )
        with jax.default_matmul_precision(settings.precision), compiled_for(settings.backend):
            return whole_program(state, batch)
    if settings.layerwise:
        raise ValueError("layers are reduced one by one only where the weights are whole")
    with jax.default_matmul_precision(settings.precision), compiled_for(settings.backend):
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
    config = nnx.merge(graphdef, state, copy=True).config
    # Where kv heads do not divide, attention may leave their gradients on a part of the devices. The
    # compiler has no good way from there to layers, so they are made whole first; factors in the same way.
    if not divided(config, shape_of(mesh).model)["kv_heads"]:
        matrices |= {name: _whole(matrices[name], mesh) for name in KV if name in matrices}
    factors = _where_the_passes_leave_them(factors, config, mesh)
    found: Measured = {}
    if settings.method == "dense":
        for name in names:
            layers = settings.selection[name]
            operands = (matrices[name], factors[name])
            found[name] = _by_layers(
                lambda chosen: reduce_matrices(chosen[0], chosen[1], settings),
                operands,
                layers,
                mesh,
            )
    else:
        for groups in groups_at_once(settings):
            layers = settings.selection[groups[0][0]]
            found |= _by_layers(
                lambda chosen: reduce_groups(chosen, settings),
                paired(factors, groups),
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
        found = with_columns(found, together(factors, matrices))
    return loss_B, {name: found[name] for name in names}


def _where_the_passes_leave_them(
    factors: dict[str, Factors], config: DecoderConfig, mesh: Mesh
) -> dict[str, Factors]:
    """The same factors, split as the weights' outputs and inputs are.

    Without this the compiler gathers each layer's factors inside the loop over layers: M times the traffic
    of the all-to-all behind it.
    """
    weights = {name: ".".join((*PROJECTIONS[name].module, "weight")) for name in factors}
    specs = parameter_specs(config, weights.values(), shape_of(mesh).model)

    def placed(array_BLTW: jax.Array, axis: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            array_BLTW, NamedSharding(mesh, P(DATA, None, None, axis))
        )

    found = {}
    for name, pair in factors.items():
        # Of a weight [..., O, I]; none of a replicated one.
        out_axis, in_axis = specs[weights[name]][-2:] or (None, None)
        found[name] = Factors(
            placed(pair.input_LTI, in_axis), placed(pair.output_grad_LTO, out_axis)
        )
    return found


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
