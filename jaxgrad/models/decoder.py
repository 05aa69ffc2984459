"""The one decoder: stacked layers under a scan, no cache. All options are fields of its config.

A forward pass takes one example; `jax.vmap` makes batches. Every linear map has a tap on its output
(`perturb`), and each input is sown once for the projections that share it. So `nnx.capture` gives both
factors of every weight gradient (see `jaxgrad.gradients.factors`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrad.dtypes import at_least_float32
from jaxgrad.models.attention import AttentionTables, causal_attention, layer_tables, rotate
from jaxgrad.models.config import Activation, DecoderConfig
from jaxgrad.projections import PROJECTION_NAMES

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class ProjectionSite:
    """Where a projection is in the decoder.

    Attributes:
        module: path of its module.
        input: path of its sown input. Projections that share an input have the same.
    """

    module: tuple[str, ...]
    input: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether the weight has a leading layer axis."""
        return self.module[0] == "layers"


PROJECTIONS: dict[str, ProjectionSite] = {
    "q": ProjectionSite(("layers", "attention", "q"), ("layers", "attention", "qkv_input")),
    "k": ProjectionSite(("layers", "attention", "k"), ("layers", "attention", "qkv_input")),
    "v": ProjectionSite(("layers", "attention", "v"), ("layers", "attention", "qkv_input")),
    "o": ProjectionSite(("layers", "attention", "o"), ("layers", "attention", "o_input")),
    "gate": ProjectionSite(("layers", "mlp", "gate"), ("layers", "mlp", "gate_up_input")),
    "up": ProjectionSite(("layers", "mlp", "up"), ("layers", "mlp", "gate_up_input")),
    "down": ProjectionSite(("layers", "mlp", "down"), ("layers", "mlp", "down_input")),
    "lm_head": ProjectionSite(("lm_head",), ("head_input",)),
}
assert tuple(PROJECTIONS) == PROJECTION_NAMES


def projections_of(config: DecoderConfig) -> tuple[str, ...]:
    """The projections that a decoder has.

    A tied head is none: its weight is the embedding's, whose gradient has another form.
    """
    absent = {"gate": not config.gated_mlp, "lm_head": config.tied_embeddings}
    return tuple(name for name in PROJECTIONS if not absent.get(name))


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
    """RMSNorm or LayerNorm over the last axis, computed in at least float32."""

    def __init__(self, width: int, config: DecoderConfig, *, stack: tuple[int, ...], dtype: Any):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        self.weight = nnx.Param(jnp.zeros((*stack, width), dtype))
        has_bias = self.kind == "layer"
        self.bias = nnx.Param(jnp.zeros((*stack, width), dtype)) if has_bias else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x = inputs.astype(at_least_float32(inputs.dtype))
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        along_last = (*[None] * (x.ndim - 1), slice(None))
        weight = self.weight[...].astype(x.dtype)[along_last]
        x = x * (1 + weight if self.kind == "rms_plus_one" else weight)
        if self.bias is not None:
            x = x + self.bias[...].astype(x.dtype)[along_last]
        return x.astype(inputs.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with its projections q, k, v and o."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: Any):
        self.config = config
        attention_width = config.num_heads * config.head_size
        kv_width = config.num_kv_heads * config.head_size
        options: dict[str, Any] = {"stack": stack, "dtype": dtype}
        self.q = Linear(attention_width, config.width, bias=config.qkv_bias, **options)
        self.k = Linear(kv_width, config.width, bias=config.qkv_bias, **options)
        self.v = Linear(kv_width, config.width, bias=config.qkv_bias, **options)
        self.o = Linear(config.width, attention_width, bias=config.output_bias, **options)
        sizes = {"none": None, "head": (config.head_size,) * 2, "full": (attention_width, kv_width)}
        size = sizes[config.qk_norm]
        self.q_norm = Norm(size[0], config, **options) if size else None
        self.k_norm = Norm(size[1], config, **options) if size else None

    def __call__(self, x_TD: jax.Array, tables: AttentionTables) -> jax.Array:
        """[T, D] -> [T, D]."""
        config = self.config
        _sow_input(self, "qkv_input", x_TD)
        q_TNH = self._heads(self.q(x_TD), self.q_norm, config.num_heads)
        k_TKH = self._heads(self.k(x_TD), self.k_norm, config.num_kv_heads)
        v_TKH = self._heads(self.v(x_TD), None, config.num_kv_heads)
        if tables.cos_sin_2TR is not None:
            q_TNH, k_TKH = rotate(q_TNH, tables.cos_sin_2TR), rotate(k_TKH, tables.cos_sin_2TR)
        mixed_TNH = causal_attention(q_TNH, k_TKH, v_TKH, tables, softcap=config.attention_softcap)
        mixed_TO = mixed_TNH.reshape(x_TD.shape[0], -1)
        _sow_input(self, "o_input", mixed_TO)
        return self.o(mixed_TO)

    def _heads(self, x_TO: jax.Array, norm: Norm | None, num_heads: int) -> jax.Array:
        if norm is not None and self.config.qk_norm == "full":
            x_TO = norm(x_TO)
        x_TNH = x_TO.reshape(x_TO.shape[0], num_heads, -1)
        return norm(x_TNH) if norm is not None and self.config.qk_norm == "head" else x_TNH


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)); without a gate down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig, *, stack: tuple[int, ...], dtype: Any):
        options: dict[str, Any] = {"bias": config.mlp_bias, "stack": stack, "dtype": dtype}
        gated = config.gated_mlp
        self.gate = Linear(config.mlp_width, config.width, **options) if gated else None
        self.up = Linear(config.mlp_width, config.width, **options)
        self.down = Linear(config.width, config.mlp_width, **options)
        self.activation = config.activation

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]."""
        _sow_input(self, "gate_up_input", x_TD)
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden_TF = activate(self.up(x_TD))
        else:
            hidden_TF = activate(self.gate(x_TD)) * self.up(x_TD)
        _sow_input(self, "down_input", hidden_TF)
        return self.down(hidden_TF)


class Layer(nnx.Module):
    """Attention and MLP, each added to the residual stream. Holds the stacked weights of all layers."""

    def __init__(self, config: DecoderConfig, *, dtype: Any):
        self.config = config
        options: dict[str, Any] = {"stack": (config.num_layers,), "dtype": dtype}
        norms_inputs = config.norm_placement in ("before", "both")
        norms_outputs = config.norm_placement in ("after", "both")
        self.attention_norm = Norm(config.width, config, **options) if norms_inputs else None
        self.attention = Attention(config, **options)
        self.attention_post_norm = Norm(config.width, config, **options) if norms_outputs else None
        self.mlp_norm = Norm(config.width, config, **options) if norms_inputs else None
        self.mlp = Mlp(config, **options)
        self.mlp_post_norm = Norm(config.width, config, **options) if norms_outputs else None

    def __call__(self, x_TD: jax.Array, tables: AttentionTables) -> jax.Array:
        """[T, D] -> [T, D], of one layer; `Decoder` scans over the stack."""

        def normed(norm: Norm | None, x_TD: jax.Array) -> jax.Array:
            return x_TD if norm is None else norm(x_TD)

        def added(x_TD: jax.Array, norm: Norm | None, change_TD: jax.Array) -> jax.Array:
            return x_TD + _scaled(normed(norm, change_TD), self.config.residual_scale)

        attended_TD = self.attention(normed(self.attention_norm, x_TD), tables)
        middle_TD = added(x_TD, self.attention_post_norm, attended_TD)
        mlp_input_TD = x_TD if self.config.parallel_residual else middle_TD
        mapped_TD = self.mlp(normed(self.mlp_norm, mlp_input_TD))
        return added(middle_TD, self.mlp_post_norm, mapped_TD)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * factor


class Decoder(nnx.Module):
    """Embedding, scanned layers, final norm, head. Weights are zeros until a checkpoint fills them."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32):
        self.config = config
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.width), dtype))
        self.position_embedding = (
            nnx.Param(jnp.zeros((config.max_positions, config.width), dtype))
            if config.learned_positions
            else None
        )
        self.layers = Layer(config, dtype=dtype)
        self.final_norm = Norm(config.width, config, stack=(), dtype=dtype)
        self.lm_head = (
            None
            if config.tied_embeddings
            else Linear(config.vocab_size, config.width, bias=False, stack=(), dtype=dtype)
        )

    def __call__(
        self, tokens_T: jax.Array, positions_S: jax.Array, num_tokens: jax.Array | None = None
    ) -> jax.Array:
        """Logits [S, V] of the token that follows each of `positions_S`; see `hidden`."""
        return self.logits(self.hidden(tokens_T, positions_S, num_tokens))

    def hidden(
        self, tokens_T: jax.Array, positions_S: jax.Array, num_tokens: jax.Array | None = None
    ) -> jax.Array:
        """The head's input, [S, D]: the residual stream at `positions_S` after the final norm.

        Args:
            tokens_T: token ids, int32. Padding is on the right, where no real token attends to it.
            positions_S: the positions whose logits are wanted, int32.
            num_tokens: tokens without padding, int32 scalar; None for T. Used only if the rope depends
                on it (`Rope.depends_on_length`).
        """
        x_TD = self.embed(tokens_T)
        tables, traits_L = self.tables(x_TD, num_tokens)
        scan = nnx.scan(
            lambda layer, traits, x_TD: layer(x_TD, tables(traits)),
            in_axes=(0, 0, nnx.Carry),
            out_axes=nnx.Carry,
        )
        return self.at_positions(scan(self.layers, traits_L, x_TD), positions_S)

    def embed(self, tokens_T: jax.Array) -> jax.Array:
        """The first layer's input, [T, D]."""
        x_TD = _scaled(self.embedding[...][tokens_T], self.config.embedding_scale)
        if self.position_embedding is not None:
            x_TD = x_TD + self.position_embedding[...][: tokens_T.shape[0]]
        return x_TD

    def tables(
        self, x_TD: jax.Array, num_tokens: jax.Array | None
    ) -> tuple[Callable[[dict[str, jax.Array]], AttentionTables], dict[str, jax.Array]]:
        """See `layer_tables`."""
        dtype = np.dtype(at_least_float32(x_TD.dtype))
        return layer_tables(self.config, x_TD.shape[0], num_tokens, dtype)

    def at_positions(self, x_TD: jax.Array, positions_S: jax.Array) -> jax.Array:
        """The head's input [S, D] from the last layer's output [T, D]."""
        return self.final_norm(x_TD[positions_S])

    def logits(self, x_SD: jax.Array) -> jax.Array:
        """Logits [S, V] from any rows of `hidden`, [S, D]."""
        config = self.config
        if self.lm_head is None:
            logits_SV = jnp.einsum("sd,vd->sv", x_SD, self.embedding[...])
        else:
            _sow_input(self, "head_input", x_SD)
            logits_SV = self.lm_head(x_SD)
        logits_SV = _scaled(logits_SV, config.logit_scale)
        if config.logit_softcap is not None:
            logits_SV = logits_SV.astype(at_least_float32(logits_SV.dtype))
            logits_SV = config.logit_softcap * jnp.tanh(logits_SV / config.logit_softcap)
        return logits_SV


def abstract_decoder(config: DecoderConfig, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure and the shapes of its weights. Allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype)))


def named_parameters(state: nnx.State) -> dict[str, Any]:
    """A decoder's parameters (arrays or shapes) by name, such as "layers.attention.q.weight"."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def with_parameters(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """A decoder's state with these arrays, by the names of `named_parameters`."""
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in flat]
    return nnx.from_flat_state(filled)


def num_parameters(config: DecoderConfig) -> int:
    """Scalars in all weights; a tied head and its embedding count once."""
    _, state = abstract_decoder(config, jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# Cached because every call traces the decoder.
@functools.lru_cache(maxsize=16)
def parameter_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by name; those of layers have a leading axis L."""
    _, abstract = abstract_decoder(config, jnp.float32)
    return {name: value.shape for name, value in named_parameters(abstract).items()}
