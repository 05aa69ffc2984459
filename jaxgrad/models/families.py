"""Model families: which attributes make the decoder's config, and which weight is which.

A family is data: a reader of the config and a table of keys. A config.json is read as it stands in
the file, not through transformers' config classes, which drop and rename attributes: one that is
neither read nor at its neutral value raises, and so does a weight that the table does not know (in
`load`).
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxgrad.errors import UserError
from jaxgrad.models.config import Activation, DecoderConfig, Rope

# Attributes that cannot change a gradient in eval mode: token ids and text (the tokenizer's
# business), what a forward pass returns or caches, training-time noise and initialisation, text
# generation, provenance.
_IRRELEVANT = """
    torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    tokenizer_class transformers_version initializer_range _name_or_path name_or_path _commit_hash
    attention_dropout output_attentions output_hidden_states return_dict id2label label2id
    num_labels task_specific_params _attn_implementation attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled model_type transformers.js_config
    unsloth_fixed unsloth_version max_length max_new_tokens min_length do_sample temperature top_k
    top_p typical_p num_beams repetition_penalty length_penalty no_repeat_ngram_size
    num_return_sequences
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())

# What to say of attributes that stand for a whole kind of model.
REFUSED = {
    "auto_map": "the model brings code of its own, which jaxgrad never runs",
    "quantization_config": "quantized weights; give the model that they were made from",
}

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

ROPE_KINDS = ("default", "linear", "llama3")


class _Required:
    """The default of an attribute that has none."""


REQUIRED = _Required()


class Attributes:
    """Reads attributes by name and remembers which: the rest is held to its neutral values.

    A reader gets a harmless stand-in for a value that it cannot have: `finish` raises all problems
    together, so that a config is mended in one go.

    Args:
        values: attribute name -> value.
        neutral: the values that an attribute may have without being read.
        where: the file, for messages.
        label: what stands before the names in messages ("rope_scaling."); the problems of a
            labelled part are collected by the whole.
    """

    def __init__(
        self, values: Mapping[str, Any], neutral: Mapping[str, Any], where: str, label: str = ""
    ) -> None:
        self._values, self._neutral, self.where, self._label = values, neutral, where, label
        self._read: set[str] = set()
        self._problems: list[str] = []

    def has(self, name: str) -> bool:
        """Whether `name` stands there, were it as null."""
        return name in self._values

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of `name`, or its default; a missing one without a default is a problem."""
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            self.problem(f"{self._label}{name} is missing")
            return None
        return default

    def count(self, name: str, default: int | _Required = REQUIRED) -> int:
        """A positive whole number. With a default, null means the default too."""
        value = self.get(name, default)
        if value is None and not isinstance(default, _Required):
            return default
        if _is_number(value, int) and 1 <= value < 2**31:
            return value
        return self._refuse(name, value, "a positive whole number", 1)

    def number(self, name: str, default: float | _Required = REQUIRED) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        if _is_number(value, int | float) and 0 < value <= sys.float_info.max:
            return float(value)
        return self._refuse(name, value, "a positive number", 1.0)

    def switch(self, name: str, default: bool | _Required = REQUIRED) -> bool:
        """True or false."""
        value = self.get(name, default)
        return (
            value if isinstance(value, bool) else self._refuse(name, value, "true or false", False)
        )

    def choose(self, name: str, choices: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """The meaning of `name`'s value; a value without one is a problem."""
        value = self.get(name, default)
        if isinstance(value, str) and value in choices:
            return choices[value]
        return self._refuse(name, value, f"one of {', '.join(choices)}", None)

    def require(self, name: str, expected: Any) -> None:
        """Hold `name`, where it stands, to the one value that is understood."""
        value = self.get(name, expected)
        if value != expected:
            self.problem(f"{self._label}{name} is {_shown(value)}; understood: {_shown(expected)}")

    def problem(self, text: str) -> None:
        """Note what is not understood, for `finish`."""
        if text not in self._problems:
            self._problems.append(text)

    def include(self, part: "Attributes") -> None:
        """Take over the problems of a part, those of its attributes that nobody read among them."""
        part._hold_unread()
        for text in part._problems:
            self.problem(text)

    def finish(self) -> None:
        """Raise one `UserError` that names every attribute which is not understood."""
        self._hold_unread()
        if self._problems:
            raise UserError(
                f"{self.where}: attributes not understood: {'; '.join(self._problems)}. Refused, "
                "because the numbers would be another model's: give a model of a supported kind, "
                "or remove what cannot change its arithmetic"
            )

    def _refuse(self, name: str, value: Any, expected: str, stand_in: Any) -> Any:
        if name in self._values:
            self.problem(f"{self._label}{name} is {_shown(value)}, not {expected}")
        return stand_in

    def _hold_unread(self) -> None:
        for name, value in self._values.items():
            if name in self._read or (name in IRRELEVANT and not self._label):
                continue
            text = f"{self._label}{name} = {_shown(value)}"
            if name in REFUSED and value is not None:
                self.problem(f"{text} ({REFUSED[name]})")
            elif name not in REFUSED and name not in self._neutral:
                self.problem(f"{text} is not known")
            elif name in self._neutral and value != self._neutral[name]:
                self.problem(f"{text}; understood: {_shown(self._neutral[name])}")


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture as config reader and key table.

    Attributes:
        architecture: the `architectures` entry in config.json.
        read_config: attributes -> `DecoderConfig`.
        keys: decoder path ("layers.attention.q.weight") -> weight name, "{layer}" for the layer.
        derived: weight names, with "{layer}", that old checkpoints hold and the config implies.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Attributes], DecoderConfig]
    keys: Mapping[str, str]
    derived: tuple[str, ...] = ()


def read_rope(attributes: Attributes, *, max_positions: int) -> dict[str, Any]:
    """Fields of `Rope` (one rope for all layers), from any generation of config.json.

    transformers 5 writes `rope_parameters`; older ones write `rope_theta` and, for long contexts,
    `rope_scaling`, its kind under "type" or "rope_type". What is said twice must be said alike.
    """
    parts = []
    for name in ("rope_scaling", "rope_parameters"):
        value = attributes.get(name, None)
        if value is not None and not isinstance(value, Mapping):
            attributes.problem(f"{name} is {_shown(value)}, not an object")
        elif value:
            parts.append(Attributes(value, {}, attributes.where, f"{name}."))
    parts = parts or [Attributes({}, {}, attributes.where)]
    readings = [_rope_fields(attributes, part, max_positions) for part in parts]
    if readings[0] != readings[-1]:
        attributes.problem("rope_scaling and rope_parameters contradict each other")
    return readings[0]


def _rope_fields(whole: Attributes, rope: Attributes, max_positions: int) -> dict[str, Any]:
    if rope.has("rope_theta"):
        theta = rope.number("rope_theta")
        whole.require("rope_theta", rope.get("rope_theta"))
    else:
        theta = whole.number("rope_theta", 10000.0)
    old_name, new_name = rope.get("type", None), rope.get("rope_type", None)
    if old_name is not None and new_name is not None:
        rope.require("type", new_name)
    key = "type" if new_name is None and old_name is not None else "rope_type"
    kind = rope.choose(key, {name: name for name in ROPE_KINDS}, "default")
    fields: dict[str, Any] = {"theta": theta, "kind": kind}
    if kind in ("linear", "llama3"):
        fields["factor"] = rope.number("factor")
    if kind == "llama3":
        fields["low_frequency_factor"] = rope.number("low_freq_factor")
        fields["high_frequency_factor"] = rope.number("high_freq_factor")
        fields["original_length"] = rope.count("original_max_position_embeddings", max_positions)
    whole.include(rope)
    return fields


def read_llama(attributes: Attributes) -> DecoderConfig:
    """Llama 2, 3, 3.1, 3.2 and everything that ships as LlamaForCausalLM (SmolLM2)."""
    # Tensor-parallel slicing of the training code; the sum over slices is the plain product.
    attributes.require("pretraining_tp", 1)
    # What nanotron writes into SmolLM2's: half-rotation, as everybody else's.
    attributes.require("rope_interleaved", False)
    attributes.require("is_llama_config", True)
    width = attributes.count("hidden_size")
    num_heads = attributes.count("num_attention_heads")
    max_positions = attributes.count("max_position_embeddings")
    fields: dict[str, Any] = {
        "width": width,
        "num_heads": num_heads,
        "max_positions": max_positions,
        "vocab_size": attributes.count("vocab_size"),
        "mlp_width": attributes.count("intermediate_size"),
        "num_layers": attributes.count("num_hidden_layers"),
        # Younger than the oldest checkpoints, so with transformers' defaults.
        "num_kv_heads": attributes.count("num_key_value_heads", num_heads),
        "head_size": attributes.count("head_dim", width // num_heads),
        "activation": attributes.choose("hidden_act", HF_ACTIVATIONS),
        "norm_epsilon": attributes.number("rms_norm_eps"),
        "attention_bias": attributes.switch("attention_bias", False),
        "mlp_bias": attributes.switch("mlp_bias", False),
        "tied_embeddings": attributes.switch("tie_word_embeddings", False),
    }
    rope = read_rope(attributes, max_positions=max_positions)
    attributes.finish()
    try:
        if attributes.get("head_dim", None) is None and width % num_heads:
            raise ValueError(f"the width {width} does not divide over {num_heads} heads")
        return DecoderConfig(**fields, rope=Rope(**rope))
    except ValueError as error:
        raise UserError(f"{attributes.where}: {error}; no model can have such sizes") from error


LLAMA_KEYS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    **{
        f"layers.{module}.{ours}.{part}": f"model.layers.{{layer}}.{block}.{ours}_proj.{part}"
        for module, block, names in (
            ("attention", "self_attn", ("q", "k", "v", "o")),
            ("mlp", "mlp", ("gate", "up", "down")),
        )
        for ours in names
        for part in ("weight", "bias")
    },
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        read_config=read_llama,
        keys=LLAMA_KEYS,
        derived=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    ),
}


def family_of(model_type: Any, where: str) -> Family:
    """The family of a config's `model_type`, or a `UserError` that lists those there are."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
        what = (
            "no model_type" if model_type is None else f"model type {model_type!r}: not supported"
        )
        raise UserError(f"{where}: {what}; give a model of a supported family: {known}")
    return family
