"""GGUF architectures in Hugging Face's terms: tables of names, and the config.json that metadata give.

An architecture is data: metadata entries, tensor names, and how llama.cpp's converter changes weights.
Attributes that the converter drops, because llama.cpp hard-codes them, are constants here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{layer}.attn_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "blk.{layer}.ffn_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    **{
        f"blk.{{layer}}.{theirs}.weight": f"model.layers.{{layer}}.{ours}_proj.weight"
        for theirs, ours in (
            ("attn_q", "self_attn.q"),
            ("attn_k", "self_attn.k"),
            ("attn_v", "self_attn.v"),
            ("attn_output", "self_attn.o"),
            ("ffn_gate", "mlp.gate"),
            ("ffn_up", "mlp.up"),
            ("ffn_down", "mlp.down"),
        )
    },
}
BIAS_NAMES = {
    name.removesuffix("weight") + "bias": hf_name.removesuffix("weight") + "bias"
    for name, hf_name in TENSOR_NAMES.items()
    if "_proj." in hf_name
}
QKV_BIAS_NAMES = {
    name: BIAS_NAMES[name] for name in (f"blk.{{layer}}.attn_{part}.bias" for part in "qkv")
}
QK_NORM_NAMES = {
    f"blk.{{layer}}.attn_{part}_norm.weight": f"model.layers.{{layer}}.self_attn.{part}_norm.weight"
    for part in "qk"
}
# Gemma 2 and 3 have norms before and after attention and MLP.
SANDWICH_NORM_NAMES = {
    f"blk.{{layer}}.{theirs}.weight": f"model.layers.{{layer}}.{ours}.weight"
    for theirs, ours in (
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )
}
ROPE_DIVISORS = "rope_freqs.weight"

# Metadata of the architecture -> attribute of the config.json.
COUNTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "vocab_size": "vocab_size",
}
NUMBERS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# All are the head size: no architecture here rotates only a part of it.
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
ROPE_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")

# llama.cpp requires these of every architecture here.
REQUIRED = (
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
OPTIONAL = ("attention.head_count_kv", "rope.freq_base", "vocab_size")
# Entries that change nothing if they have one of these values. `...` is any value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    # In the first Qwen files; llama.cpp reads it for GPT-NeoX only.
    "use_parallel_residual": (...,),
    # Provenance of a scaling. Kinds of scaling that use the length are refused.
    "rope.scaling.finetuned": (...,),
    "rope.scaling.original_context_length": (...,),
}
MIXTURE = "a mixture of experts, which jaxgrad does not read"


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """One GGUF architecture.

    Attributes:
        model_type: in the config.json.
        constants: attributes of the config.json that the architecture implies.
        tensor_names: GGUF name -> Hugging Face name, "{layer}" for the layer.
        required, optional: metadata besides `REQUIRED` and `OPTIONAL`.
        defaults: attribute -> the value that llama.cpp takes if the file has none.
        neutral: metadata besides `NEUTRAL` that change nothing if they have these values.
        norm_offset: what the converter adds to the norms' weights.
        interleaved: whether the converter interleaves the rotary pairs of q and k.
        states_head_size: whether the config.json always has head_dim. If not, it has it only if the head
            size is not hidden_size / num_attention_heads.
        scale_by_width: number of layers of the one model that divides its scores by the square root of
            hidden_size / num_attention_heads; the others use the head size. 0 for a family without
            query_pre_attn_scalar. The file does not say: llama.cpp goes by the layers, too.
    """

    model_type: str
    constants: Mapping[str, Any]
    tensor_names: Mapping[str, str]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    norm_offset: float = 0.0
    interleaved: bool = False
    states_head_size: bool = True
    scale_by_width: int = 0

    @property
    def known(self) -> frozenset[str]:
        """The metadata that the family reads, without the prefix of the architecture's name."""
        return frozenset(
            (*REQUIRED, *OPTIONAL, *self.required, *self.optional, *HEAD_SIZES, *ROPE_SCALING)
        )


THETA = {"rope_theta": 10000.0}
GEMMA_ACT = "gelu_pytorch_tanh"
GGUF_FAMILIES = {
    "llama": GgufFamily(
        model_type="llama",
        constants={"hidden_act": "silu"},
        tensor_names=TENSOR_NAMES | BIAS_NAMES,
        defaults=THETA,
        interleaved=True,
        states_head_size=False,
    ),
    "qwen2": GgufFamily(
        model_type="qwen2",
        constants={"hidden_act": "silu"},
        tensor_names=TENSOR_NAMES | QKV_BIAS_NAMES,
        defaults=THETA,
        states_head_size=False,
    ),
    "qwen3": GgufFamily(
        model_type="qwen3",
        constants={"hidden_act": "silu", "attention_bias": False},
        tensor_names=TENSOR_NAMES | QK_NORM_NAMES,
        defaults=THETA,
    ),
    "gemma": GgufFamily(
        model_type="gemma",
        constants={"hidden_act": GEMMA_ACT},
        tensor_names=TENSOR_NAMES,
        defaults=THETA,
        norm_offset=1.0,
    ),
    "gemma2": GgufFamily(
        model_type="gemma2",
        constants={"hidden_activation": GEMMA_ACT},
        tensor_names=TENSOR_NAMES | SANDWICH_NORM_NAMES,
        optional=("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        defaults=THETA
        | {
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        neutral={"attention.sliding_window_pattern": (2,)},
        norm_offset=1.0,
        scale_by_width=46,
    ),
    "gemma3": GgufFamily(
        model_type="gemma3_text",
        constants={"hidden_activation": GEMMA_ACT},
        tensor_names=TENSOR_NAMES | SANDWICH_NORM_NAMES | QK_NORM_NAMES,
        required=("attention.sliding_window", "rope.freq_base"),
        optional=(
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
            "final_logit_softcapping",
        ),
        defaults={"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        norm_offset=1.0,
        scale_by_width=62,
    ),
}


def config_from_metadata(
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    rope_divisors: np.ndarray | None,
) -> tuple[dict[str, Any], list[str]]:
    """The config.json that a file's metadata describe.

    Args:
        architecture: a key of `GGUF_FAMILIES`.
        values: metadata entries of the architecture, without the prefix of its name.
        tensors: Hugging Face name -> shape.
        rope_divisors: the file's `rope_freqs.weight` [head size / 2], or None.

    Returns:
        The config, and the problems: metadata that are not understood. With problems the config is
        incomplete.
    """
    family = GGUF_FAMILIES[architecture]
    problems = _unknown(architecture, family, values)
    config: dict[str, Any] = dict(family.defaults)
    for name, value in values.items():
        if name not in family.known:
            continue
        if name in COUNTS or name in HEAD_SIZES:
            if not _is_count(value):
                problems.append(f"{architecture}.{name} is {_shown(value)}, not a positive integer")
            elif name in COUNTS:
                config[COUNTS[name]] = value
        elif name in NUMBERS:
            if not _is_positive(value):
                problems.append(f"{architecture}.{name} is {_shown(value)}, not a positive number")
            config[NUMBERS[name]] = value
    sizes = {name: values[name] for name in HEAD_SIZES if name in values}
    if len(set(map(str, sizes.values()))) > 1:
        problems.append(f"the head sizes differ: {sizes}")
    if problems:
        return config, problems

    heads, width = config["num_attention_heads"], config["hidden_size"]
    config.setdefault("num_key_value_heads", heads)
    head_size = next(iter(sizes.values()), width // heads)
    if family.states_head_size or head_size * heads != width:
        config["head_dim"] = head_size
    if family.scale_by_width:
        by_width = config["num_hidden_layers"] == family.scale_by_width
        config["query_pre_attn_scalar"] = width // heads if by_width else head_size
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding:
        config.setdefault("vocab_size", embedding[0])
    if architecture == "llama":
        for part, name in (("attention", "self_attn.q_proj"), ("mlp", "mlp.gate_proj")):
            if f"model.layers.0.{name}.bias" in tensors:
                config[f"{part}_bias"] = True
    scaling, problem = _rope_scaling(values, rope_divisors, config["rope_theta"], head_size)
    if scaling:
        config["rope_scaling"] = scaling
    config |= family.constants
    config["model_type"] = family.model_type
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config, [f"{architecture}.{problem}"] if problem else []


def _unknown(architecture: str, family: GgufFamily, values: Mapping[str, Any]) -> list[str]:
    missing = [name for name in (*REQUIRED, *family.required) if name not in values]
    problems = [f"{architecture}.{name} is missing" for name in missing]
    neutral = NEUTRAL | dict(family.neutral)
    for name, value in values.items():
        entry = f"{architecture}.{name} = {_shown(value)}"
        if name in family.known or any(v is ... or v == value for v in neutral.get(name, ())):
            continue
        is_mixture = name == "expert_count"
        problems.append(f"{entry} ({MIXTURE})" if is_mixture else f"{entry} is not known")
    return problems


def _rope_scaling(
    values: Mapping[str, Any], divisors: np.ndarray | None, theta: float, head_size: int
) -> tuple[dict[str, Any] | None, str | None]:
    """The config's rope_scaling or None, and a problem or None."""
    # llama.cpp goes by the factor; without a type the scaling is linear.
    kind = values.get("rope.scaling.type", "linear")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    if kind not in ("linear", "none"):
        return None, f"rope.scaling.type = {_shown(kind)} is not known"
    if not _is_positive(factor) or (kind == "none" and factor != 1.0):
        return None, f"rope.scaling.factor is {_shown(factor)} with rope.scaling.type {kind!r}"
    if divisors is None or np.all(divisors == 1.0):
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None, None
    if factor != 1.0:
        return None, f"rope.scaling.factor = {factor} contradicts the tensor {ROPE_DIVISORS}"
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_divisors(scaling, theta, head_size)
    # The converter computes them in float32, and the blend multiplies the rounding by up to `factor`.
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        return None, (
            f"rope.freq_base = {theta} does not give the frequencies of the tensor {ROPE_DIVISORS} "
            "by the rule of Llama 3.1 for 8192 positions"
        )
    return scaling, None


def _llama3_divisors(scaling: Mapping[str, Any], theta: float, head_size: int) -> np.ndarray:
    """What each rotary frequency is divided by; `apply_scaling` in the code of Llama 3.1.

    Wavelengths below length / high are kept, those above length / low are divided by the factor, and
    between them the frequency is a linear blend in length / wavelength.
    """
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / scaling["factor"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
