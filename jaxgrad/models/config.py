"""The frozen description of a decoder: all that its arithmetic depends on, and nothing else.

A test checks that each field changes a shape, an output or an error.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding in the half-rotation layout of Hugging Face.

    | kind | frequencies |
    |---|---|
    | default | from theta |
    | linear | divided by `factor` |
    | llama3 | Llama 3.1: long wavelengths divided by `factor`, short ones kept, a blend in between |
    | longrope | each divided by its own factor, see below |

    LongRoPE takes `short_factors` for sequences of up to `original_length` tokens, else `long_factors`.

    Attributes:
        rotated_fraction: share of each head that is rotated; the rest is left as it is.
        magnitude: factor on cosines and sines.

    Raises:
        ValueError: "llama3" whose low frequency factor is not below the high one; a rotated fraction
            outside (0, 1].
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_length: int = 1
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotated_fraction: float = 1.0
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind == "llama3" and not low < high:
            raise ValueError(
                f"the rope's low frequency factor {low} is not below its high one {high}"
            )
        if not 0 < self.rotated_fraction <= 1:
            raise ValueError(f"the rotated fraction {self.rotated_fraction} is not in (0, 1]")

    def rotated_size(self, head_size: int) -> int:
        """How many entries of a head are rotated."""
        return int(head_size * self.rotated_fraction)

    def depends_on_length(self, num_tokens: int) -> bool:
        """Whether the frequencies depend on a sequence's length, if padded to `num_tokens`."""
        return self.kind == "longrope" and num_tokens > self.original_length

    def inverse_frequencies(self, head_size: int, *, is_long: bool = False) -> np.ndarray:
        """Radians per position of each rotated pair, float64 [rotated size / 2]."""
        size = self.rotated_size(head_size)
        frequencies = self.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return frequencies * (smooth + (1 - smooth) / self.factor)
        if self.kind == "longrope":
            return frequencies / np.asarray(self.long_factors if is_long else self.short_factors)
        return frequencies

    def cos_sin(
        self, num_tokens: int, head_size: int, dtype: np.dtype, *, is_long: bool = False
    ) -> np.ndarray:
        """Cosines and sines, [2, num_tokens, rotated size / 2] of `dtype`.

        In float32, frequencies and angles are rounded to float32 first, as transformers does. Rounding
        an angle near 1000 changes it by 6e-5, more than all other roundings of the forward pass.
        """
        frequencies = self.inverse_frequencies(head_size, is_long=is_long).astype(dtype)
        angles_TR = np.arange(num_tokens, dtype=dtype)[:, None] * frequencies[None, :]
        angles_TR = angles_TR.astype(np.float64)
        return (self.magnitude * np.stack([np.cos(angles_TR), np.sin(angles_TR)])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What the layers of one decoder may differ in.

    Attributes:
        rope: None if queries and keys are not rotated.
        window: how many tokens a token attends to, itself included; None for no limit.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder. Sizes are counts; defaults are Llama's.

    Attributes:
        kinds: the kinds of attention that occur.
        layer_kinds: each layer's index in `kinds`.
        norm: "rms" scales by its weight w, "rms_plus_one" by 1 + w; "layer" subtracts the mean and has
            a bias.
        norm_placement: before attention and MLP, after them (on what they add), or both.
        qk_norm: norm of queries and keys, of each head or over all heads together.
        attention_scale: factor on the products of queries and keys; None for 1 / sqrt(head_size).
        scale_by_depth: also divide them by the layer's number, from 1.
        attention_softcap, logit_softcap: c, if x becomes c tanh(x / c).
        parallel_residual: attention and MLP both read the layer's input.
        gated_mlp: down(activation(gate(x)) up(x)), else down(activation(up(x))).
        learned_positions: a vector per position is added to the embedding.

    Raises:
        ValueError: sizes that no decoder can have. `families.read_config` makes it a `UserError`.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    activation: Activation
    norm_epsilon: float
    kinds: tuple[AttentionKind, ...]
    layer_kinds: tuple[int, ...]
    tied_embeddings: bool
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_placement: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    scale_by_depth: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    parallel_residual: bool = False
    gated_mlp: bool = True
    learned_positions: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, not a positive count")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} kv heads"
            )
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"{len(self.layer_kinds)} layer kinds for {self.num_layers} layers")
        for kind in self.kinds:
            if kind.rope is not None:
                self._check_rope(kind.rope)

    def _check_rope(self, rope: Rope) -> None:
        size = rope.rotated_size(self.head_size)
        if size % 2 or not size:
            whole = "" if rope.rotated_fraction == 1 else f" of the head size {self.head_size}"
            what = "rotated part" if whole else "head size"
            raise ValueError(f"the {what} {size}{whole} is odd: rotary pairs need an even one")
        if rope.kind == "longrope":
            for factors in (rope.short_factors, rope.long_factors):
                if len(factors) != size // 2:
                    raise ValueError(f"{len(factors)} rope factors for {size // 2} rotary pairs")
