"""A decoder as one device of a mesh has it, on one device all of it: sizes, and what its passes keep."""

import functools
import math
from dataclasses import dataclass

from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import parameter_shapes
from jaxgrad.models.sharding import ONE_DEVICE, MeshShape, device_sizes, divided

# Arrays a layer and token that wait for the backward pass, fitted to XLA's account. Linear maps keep
# nothing: their inputs are needed for weights' gradients only, which are not taken.
STREAM_ARRAYS = 4  # of D: norms and what they are of
POST_NORM_ARRAYS = 4  # of D more, where norms stand before and after
GATED_ARRAYS, PLAIN_ARRAYS = 5, 3  # of F
QK_NORM_ARRAYS = 2  # of the queries and keys, where these are normed
# The same where the weights are split: the compiler keeps other arrays, among them none of queries or keys.
SPLIT_STREAM_ARRAYS, SPLIT_GATED_ARRAYS, SPLIT_PLAIN_ARRAYS = 2, 6, 4


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


def kept_numbers(config: DecoderConfig, mesh: MeshShape) -> int:
    """Numbers a layer and token that wait for the backward pass on a device."""
    own, width = sizes_on(config, mesh), config.width
    if mesh.model == 1:
        count = STREAM_ARRAYS * width
        count += (GATED_ARRAYS if config.gated_mlp else PLAIN_ARRAYS) * own.mlp
        count += own.queries + 2 * own.keys
    else:
        count = SPLIT_STREAM_ARRAYS * width
        count += (SPLIT_GATED_ARRAYS if config.gated_mlp else SPLIT_PLAIN_ARRAYS) * own.mlp
    count += POST_NORM_ARRAYS * width * (config.norm_placement == "both")
    return count + QK_NORM_ARRAYS * (own.queries + own.keys) * (config.qk_norm != "none")
