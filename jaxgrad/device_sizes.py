"""The sizes of a decoder as one device of a mesh has them; on one device all of it."""

import functools
import math
from dataclasses import dataclass

from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.fill import parameter_shapes
from jaxgrad.sharding import ONE_DEVICE, MeshShape, device_sizes, divided


@dataclass(frozen=True)
class DeviceSizes:
    """What one device has.

    Attributes:
        queries: outputs of q.
        keys: outputs of k, and of v.
        heads: query heads whose scores it computes.
        mlp: of the MLP's width.
        vocabulary: logits of a position.
        parameters: scalars of all parameters.
        layer_parameters: of one layer's.
        projections: projection -> (outputs, inputs) of its weight.
    """

    queries: int
    keys: int
    heads: int
    mlp: int
    vocabulary: int
    parameters: int
    layer_parameters: int
    projections: dict[str, tuple[int, int]]


def projection_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Projection -> (outputs, inputs) of its whole weight."""
    return sizes_on(config, ONE_DEVICE).projections


@functools.lru_cache(maxsize=64)
def sizes_on(config: DecoderConfig, mesh: MeshShape) -> DeviceSizes:
    """The sizes on a device of a mesh, which need not be there."""
    splits = divided(config, mesh.model)

    def share(total: int, is_split: bool) -> int:
        return total // mesh.model if is_split else total

    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    queries = share(num_heads * config.head_size, splits["heads"])
    keys = share(num_kv_heads * config.head_size, splits["kv_heads"])
    # Heads that share keys are split in step with these, or each group among whole devices.
    in_step = splits["kv_heads"] or mesh.model % num_kv_heads == 0
    heads = share(num_heads, splits["heads"] and in_step)
    mlp = share(config.mlp_width, splits["mlp"])
    vocabulary = share(config.vocab_size, splits["vocabulary"])
    parameters = device_sizes(config, parameter_shapes(config), mesh.model)
    of_layers = sum(size for name, size in parameters.items() if name.startswith("layers."))
    width = config.width
    return DeviceSizes(
        queries=queries,
        keys=keys,
        heads=heads,
        mlp=mlp,
        vocabulary=vocabulary,
        parameters=sum(parameters.values()),
        layer_parameters=math.ceil(of_layers / config.num_layers),
        projections={
            "q": (queries, width),
            "k": (keys, width),
            "v": (keys, width),
            "o": (width, queries),
            "gate": (mlp, width),
            "up": (mlp, width),
            "down": (width, mlp),
            "lm_head": (vocabulary, width),
        },
    )
