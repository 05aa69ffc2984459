"""Per-device sizes of a decoder, and how much of each layer the backward pass needs."""

import functools
import math
from dataclasses import dataclass

from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import parameter_shapes
from jaxgrad.models.sharding import ONE_DEVICE, MeshShape, divided, scalars_per_device

# Arrays per layer and token that are kept for the backward pass, fitted to XLA's memory reports. Linear
# maps keep nothing: their inputs are needed only for weight gradients, which are not taken.
STREAM_ARRAYS = 4  # of D: norms and their inputs
POST_NORM_ARRAYS = 4  # of D more, if there are norms before and after
GATED_ARRAYS, PLAIN_ARRAYS = 5, 3  # of F
QK_NORM_ARRAYS = 2  # of the queries and keys, if these are normed
# With split weights the compiler keeps other arrays, and no queries or keys.
SPLIT_STREAM_ARRAYS, SPLIT_GATED_ARRAYS, SPLIT_PLAIN_ARRAYS = 2, 6, 4


@dataclass(frozen=True)
class DeviceSizes:
    """How much of a decoder one device holds.

    Attributes:
        queries: outputs of q.
        keys: outputs of k, and of v.
        heads: query heads whose scores it computes.
        mlp: its share of the MLP's width.
        vocabulary: logits per position.
        parameters: scalars of all parameters.
        layer_parameters: scalars of one layer's.
        projections: projection -> (outputs, inputs) of its weight, also those a decoder lacks.
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
    """Projection -> (outputs, inputs) of its whole weight, also those that a decoder lacks."""
    return sizes_on(config, ONE_DEVICE).projections


@functools.lru_cache(maxsize=64)
def sizes_on(config: DecoderConfig, mesh: MeshShape) -> DeviceSizes:
    """The sizes on one device of a mesh. The devices need not exist."""
    splits = divided(config, mesh.model)

    def share(total: int, is_split: bool) -> int:
        return total // mesh.model if is_split else total

    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    queries = share(num_heads * config.head_size, splits["heads"])
    keys = share(num_kv_heads * config.head_size, splits["kv_heads"])
    # Query heads are split if their kv heads are split too, or if each kv head's query heads go to a
    # whole number of devices.
    follows_keys = splits["kv_heads"] or mesh.model % num_kv_heads == 0
    heads = share(num_heads, splits["heads"] and follows_keys)
    mlp = share(config.mlp_width, splits["mlp"])
    vocabulary = share(config.vocab_size, splits["vocabulary"])
    parameters = scalars_per_device(config, parameter_shapes(config), mesh.model)
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


def kept_numbers(config: DecoderConfig, mesh: MeshShape) -> int:
    """Numbers per layer and token that a device keeps for the backward pass."""
    sizes, width = sizes_on(config, mesh), config.width
    if mesh.model == 1:
        count = STREAM_ARRAYS * width
        count += (GATED_ARRAYS if config.gated_mlp else PLAIN_ARRAYS) * sizes.mlp
        count += sizes.queries + 2 * sizes.keys
    else:
        count = SPLIT_STREAM_ARRAYS * width
        count += (SPLIT_GATED_ARRAYS if config.gated_mlp else SPLIT_PLAIN_ARRAYS) * sizes.mlp
    count += POST_NORM_ARRAYS * width * (config.norm_placement == "both")
    return count + QK_NORM_ARRAYS * (sizes.queries + sizes.keys) * (config.qk_norm != "none")
