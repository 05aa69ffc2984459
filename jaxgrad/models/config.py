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

    Raises:
        ValueError: "llama3" without room between the two frequency factors to blend in.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_length: int = 1

    def __post_init__(self) -> None:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind == "llama3" and not low < high:
            raise ValueError(
                f"the rope's low frequency factor {low} is not below its high one {high}"
            )

    def inverse_frequencies(self, head_size: int) -> np.ndarray:
        """Radians a position for each rotated pair, float64 [head_size / 2]."""
        frequencies = self.theta ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return frequencies * (smooth + (1 - smooth) / self.factor)
        return frequencies

    def cos_sin(self, num_tokens: int, head_size: int, dtype: np.dtype) -> np.ndarray:
        """Cosines and sines, [2, num_tokens, head_size / 2] of `dtype`.

        In float32 the frequencies and their products with the position are rounded to float32
        first, as transformers does it: the rounding of an angle near 1000 is worth 6e-5, which is
        more than everything else in the forward pass together.
        """
        frequencies = self.inverse_frequencies(head_size).astype(dtype)
        angles_TH = np.arange(num_tokens, dtype=dtype)[:, None] * frequencies[None, :]
        angles_TH = angles_TH.astype(np.float64)
        return np.stack([np.cos(angles_TH), np.sin(angles_TH)]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is. Sizes are counts; biases and tying are switches.

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
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, not a positive count")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not divide over {self.num_kv_heads} kv heads"
            )
        if self.head_size % 2:
            raise ValueError(
                f"the head size {self.head_size} is odd: rotary pairs need an even one"
            )

    @property
    def num_parameters(self) -> int:
        """Scalars in all weights, counted from the shapes."""
        attention_width = self.num_heads * self.head_size
        kv_width = self.num_kv_heads * self.head_size
        layer = 2 * self.width * (attention_width + kv_width) + 3 * self.width * self.mlp_width
        layer += 2 * self.width
        layer += self.attention_bias * (attention_width + 2 * kv_width + self.width)
        layer += self.mlp_bias * (2 * self.mlp_width + self.width)
        head = 0 if self.tied_embeddings else self.vocab_size * self.width
        return self.vocab_size * self.width + self.num_layers * layer + self.width + head
