"""The frozen description of a decoder: every number that its arithmetic depends on, and no other.

A test proves that each field changes a shape, an output or an error.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding in the half-rotation layout of Hugging Face.

    `kind` "default": theta only. "linear": positions divided by `factor`. "llama3": Llama 3.1's
    rule, which divides long wavelengths by `factor`, keeps short ones, and blends in between.
    "longrope": each frequency divided by its own number, of `short_factors` for a sequence of up to
    `original_length` tokens and of `long_factors` for a longer one.

    Attributes:
        rotated_fraction: of each head's size; the rest of a head is left as it is.
        magnitude: what cosines and sines are multiplied by.

    Raises:
        ValueError: "llama3" without room between the two frequency factors to blend in.
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
        """How many of a head's entries are rotated."""
        return int(head_size * self.rotated_fraction)

    def depends_on_length(self, num_tokens: int) -> bool:
        """Whether sequences padded to `num_tokens` may differ in their frequencies."""
        return self.kind == "longrope" and num_tokens > self.original_length

    def inverse_frequencies(self, head_size: int, *, is_long: bool = False) -> np.ndarray:
        """Radians a position for each rotated pair, float64 [rotated size / 2]."""
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

        In float32 the frequencies and their products with the position are rounded to float32
        first, as transformers does it: the rounding of an angle near 1000 is worth 6e-5, which is
        more than everything else in the forward pass together.
        """
        frequencies = self.inverse_frequencies(head_size, is_long=is_long).astype(dtype)
        angles_TR = np.arange(num_tokens, dtype=dtype)[:, None] * frequencies[None, :]
        angles_TR = angles_TR.astype(np.float64)
        return (self.magnitude * np.stack([np.cos(angles_TR), np.sin(angles_TR)])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What the layers of one decoder may differ in.

    Attributes:
        rope: None for positions that are not rotated.
        window: how many tokens a token sees, itself included; None for all before it.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is. Sizes are counts; the defaults are those of Llama.

    Attributes:
        kinds: the kinds of attention that occur.
        layer_kinds: each layer's place in `kinds`.
        norm: "rms" scales by its weight w, "rms_plus_one" by 1 + w; "layer" has a mean and a bias.
        norm_placement: before attention and MLP, after them (on what they add), or both.
        qk_norm: a norm of queries and keys, by head or over all heads together.
        attention_scale: of the products of queries and keys; None is 1 / sqrt(head_size).
        scale_by_depth: divide it by the layer's number, from 1.
        attention_softcap, logit_softcap: c where x becomes c tanh(x / c).
        parallel_residual: attention and MLP both read the layer's input.
        gated_mlp: down(activation(gate(x)) up(x)); otherwise down(activation(up(x))).
        learned_positions: a vector for each position is added to the embedding.

    Raises:
        ValueError: sizes that no decoder can have (a family's reader turns it into a `UserError`).
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
