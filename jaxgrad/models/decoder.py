"""The one decoder: pre-norm transformer, layers stacked and scanned, no cache.

A forward pass takes one example; batches are `jax.vmap`'s job. Every linear map adds a tap
(`perturb`) to its output, and its input is sown once for all projections that share it, so that
`nnx.capture` gives the factors of each weight gradient (see `jaxgrad.gradients`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrad.dtypes import at_least_float32
from jaxgrad.models.config import Activation, DecoderConfig

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Projection:
    """Where a linear map stands in the decoder: its module, and its input's module and name."""

    module: tuple[str, ...]
    input: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether the weight has a leading layer axis."""
        return self.module[0] == "layers"


PROJECTIONS: dict[str, Projection] = {
    "q": Projection(("layers", "attention", "q"), ("layers", "attention", "qkv_input")),
    "k": Projection(("layers", "attention", "k"), ("layers", "attention", "qkv_input")),
    "v": Projection(("layers", "attention", "v"), ("layers", "attention", "qkv_input")),
    "o": Projection(("layers", "attention", "o"), ("layers", "attention", "o_input")),
    "gate": Projection(("layers", "mlp", "gate"), ("layers", "mlp", "gate_up_input")),
    "up": Projection(("layers", "mlp", "up"), ("layers", "mlp", "gate_up_input")),
    "down": Projection(("layers", "mlp", "down"), ("layers", "mlp", "down_input")),
    "lm_head": Projection(("lm_head",), ("head_input",)),
}


def _sow_input(module: nnx.Module, name: str, value: jax.Array) -> None:
    module.sow(nnx.Intermediate, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


class Linear(nnx.Module):
    """y = x W^T (+ b), with W as PyTorch stores it, [O, I]."""

    def __init__(
        self, num_out: int, num_in: int, *, bias: bool, stack: tuple[int, ...], dtype: Any
    ):
        self.weight = nnx.Param(jnp.zeros((*stack, num_out, num_in), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, num_out), dtype)) if bias else None

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """[T, I] -> [T, O]."""
        y_TO = jnp.einsum("ti,oi->to", x_TI, self.weight[...])
        if self.bias is not None:
            y_TO = y_TO + self.bias[...][None, :]
        return self.perturb("output", y_TO)


class Norm(nnx.Module):
    """RMSNorm, its mean square in at least float32."""

    def __init__(self, width: int, epsilon: float, *, stack: tuple[int, ...], dtype: Any):
        self.weight = nnx.Param(jnp.zeros((*stack, width), dtype))
        self.epsilon = epsilon

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]."""
        x = x_TD.astype(at_least_float32(x_TD.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(x_TD.dtype) * self.weight[...][None, :]


def rotate(x_TNH: jax.Array, cos_sin_2TH: jax.Array) -> jax.Array:
    """Turn each pair (x[h], x[h + H/2]) by its position's angle, in the dtype of the angles."""
    cos, sin = (part[:, None, :] for part in cos_sin_2TH)
    first, second = jnp.split(x_TNH.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_TNH.dtype)


# Rematerialised: the scores are T x T a head and layer, which at T = 1024 is most of the memory of
# a forward pass, and recomputing them costs a few percent.
@jax.checkpoint
def causal_attention(q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
    """Grouped-query attention over the tokens up to each position, [T, N, H]."""
    num_tokens, num_heads, head_size = q_TNH.shape
    num_kv_heads = k_TKH.shape[1]
    q_TKGH = q_TNH.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores_KGTS = jnp.einsum("tkgh,skh->kgts", q_TKGH, k_TKH) * (head_size**-0.5)
    position = np.arange(num_tokens)
    visible_11TS = (position[:, None] >= position[None, :])[None, None]
    scores_KGTS = scores_KGTS.astype(at_least_float32(q_TNH.dtype))
    scores_KGTS = jnp.where(visible_11TS, scores_KGTS, -jnp.inf)
    weights_KGTS = jax.nn.softmax(scores_KGTS, axis=-1).astype(q_TNH.dtype)
    return jnp.einsum("kgts,skh->tkgh", weights_KGTS, v_TKH).reshape(q_TNH.shape)


class Attention(nnx.Module):
    """Projections q, k, v, o around grouped-query attention."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: Any):
        options: dict[str, Any] = {"bias": config.attention_bias, "stack": stack, "dtype": dtype}
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        attention_width = config.num_heads * config.head_size
        kv_width = config.num_kv_heads * config.head_size
        self.q = Linear(attention_width, config.width, **options)
        self.k = Linear(kv_width, config.width, **options)
        self.v = Linear(kv_width, config.width, **options)
        self.o = Linear(config.width, attention_width, **options)

    def __call__(self, x_TD: jax.Array, cos_sin_2TH: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]; the angles are those of `Rope.cos_sin`."""
        _sow_input(self, "qkv_input", x_TD)
        num_tokens = x_TD.shape[0]
        q_TNH = self.q(x_TD).reshape(num_tokens, self.num_heads, -1)
        k_TKH = self.k(x_TD).reshape(num_tokens, self.num_kv_heads, -1)
        v_TKH = self.v(x_TD).reshape(num_tokens, self.num_kv_heads, -1)
        q_TNH, k_TKH = rotate(q_TNH, cos_sin_2TH), rotate(k_TKH, cos_sin_2TH)
        mixed_TO = causal_attention(q_TNH, k_TKH, v_TKH).reshape(num_tokens, -1)
        _sow_input(self, "o_input", mixed_TO)
        return self.o(mixed_TO)


class GatedMlp(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: Any):
        options: dict[str, Any] = {"bias": config.mlp_bias, "stack": stack, "dtype": dtype}
        self.gate = Linear(config.mlp_width, config.width, **options)
        self.up = Linear(config.mlp_width, config.width, **options)
        self.down = Linear(config.width, config.mlp_width, **options)
        self.activation = config.activation

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]."""
        _sow_input(self, "gate_up_input", x_TD)
        hidden_TF = ACTIVATIONS[self.activation](self.gate(x_TD)) * self.up(x_TD)
        _sow_input(self, "down_input", hidden_TF)
        return self.down(hidden_TF)


class Layer(nnx.Module):
    """Attention and MLP, each on the normed stream and added to it. Holds all layers, stacked."""

    def __init__(self, config: DecoderConfig, *, dtype: Any):
        options: dict[str, Any] = {"stack": (config.num_layers,), "dtype": dtype}
        self.attention_norm = Norm(config.width, config.norm_epsilon, **options)
        self.attention = Attention(config, **options)
        self.mlp_norm = Norm(config.width, config.norm_epsilon, **options)
        self.mlp = GatedMlp(config, **options)

    def __call__(self, x_TD: jax.Array, cos_sin_2TH: jax.Array) -> jax.Array:
        """[T, D] -> [T, D], of one layer: `Decoder` scans over the stack."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), cos_sin_2TH)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nnx.Module):
    """Embedding, scanned layers, final norm, head. Weights are zeros: a checkpoint fills them."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32):
        self.config = config
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype))
        self.layers = Layer(config, dtype=dtype)
        self.final_norm = Norm(config.width, config.norm_epsilon, stack=(), dtype=dtype)
        self.lm_head = (
            None
            if config.tied_embeddings
            else Linear(config.vocab_size, config.width, bias=False, stack=(), dtype=dtype)
        )

    def __call__(self, tokens_T: jax.Array, positions_S: jax.Array) -> jax.Array:
        """Logits [S, V] of the next token after each of `positions_S`.

        Args:
            tokens_T: token ids, int32. Padding stands on the right, where no position sees it.
            positions_S: the positions whose logits are wanted, int32; the head runs on no other.
        """
        x_TD = self.embedding[...][tokens_T]
        cos_sin_2TH = jnp.asarray(
            self.config.rope.cos_sin(
                tokens_T.shape[0], self.config.head_size, np.dtype(at_least_float32(x_TD.dtype))
            )
        )
        scan = nnx.scan(
            lambda layer, x_TD: layer(x_TD, cos_sin_2TH),
            in_axes=(0, nnx.Carry),
            out_axes=nnx.Carry,
        )
        x_TD = scan(self.layers, x_TD)
        x_SD = self.final_norm(x_TD[positions_S])
        if self.lm_head is None:
            return jnp.einsum("sd,vd->sv", x_SD, self.embedding[...])
        _sow_input(self, "head_input", x_SD)
        return self.lm_head(x_SD)


def abstract_decoder(config: DecoderConfig, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure and the shapes of its weights, without allocating any."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype)))
