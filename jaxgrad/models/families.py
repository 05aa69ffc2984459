"""Model families: which Hugging Face attributes become the decoder's config, and which weight is which.

A family is data: a reader of the config and a table of keys. An attribute that is neither read nor at
its neutral value raises, and so does a weight that the table does not know (in `load`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxgrad.errors import UserError
from jaxgrad.models.config import Activation, DecoderConfig, Rope

# Attributes that cannot change a gradient in eval mode: token ids and text (the tokenizer's business),
# what a forward pass returns or caches, training-time noise and initialisation, provenance.
IRRELEVANT = frozenset(
    """architectures torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id transformers_version initializer_range _name_or_path name_or_path attention_dropout
    output_attentions output_hidden_states return_dict id2label label2id problem_type
    task_specific_params _attn_implementation attn_implementation model_type
    rope_scaling rope_theta""".split()
)
# rope_scaling and rope_theta: transformers folds both into rope_parameters, which is read.

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Attributes:
    """Reads attributes by name and remembers which, so that the rest can be held to their neutral value.

    Args:
        values: attribute name -> value.
        neutral: the values that an attribute may have without being read.
        where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], neutral: Mapping[str, Any], where: str) -> None:
        self._values, self._neutral, self._where = values, neutral, where
        self._read: set[str] = set()
        self._problems: list[str] = []

    def get(self, name: str) -> Any:
        """The value of `name`; a missing one is a problem that `finish` reports."""
        self._read.add(name)
        if name not in self._values:
            self._problems.append(f"{name} is missing")
            return None
        return self._values[name]

    def choose(self, name: str, choices: Mapping[str, Any]) -> Any:
        """The meaning of `name`'s value; a value without one is a problem."""
        value = self.get(name)
        if value in choices:
            return choices[value]
        self._problems.append(f"{name} is {value!r} (understood: {', '.join(choices)})")
        return None

    def require(self, name: str, expected: Any) -> None:
        """Hold `name`, where it stands, to the one value that is understood."""
        self._read.add(name)
        if name in self._values and self._values[name] != expected:
            self._problems.append(f"{name} is {self._values[name]!r} (understood: {expected!r})")

    def finish(self) -> None:
        """Raise one `UserError` that names every attribute which is not understood."""
        for name, value in self._values.items():
            if name in self._read or name in IRRELEVANT:
                continue
            if name not in self._neutral:
                self._problems.append(f"{name} = {value!r} is not known")
            elif value != self._neutral[name]:
                self._problems.append(f"{name} = {value!r} is not understood")
        if self._problems:
            raise UserError(
                f"{self._where}: attributes not understood: {'; '.join(self._problems)}. "
                "Computing on would give numbers of another model."
            )


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture as config reader and key table.

    Attributes:
        architecture: the `architectures` entry in config.json.
        read_config: attributes -> `DecoderConfig`.
        keys: decoder path ("layers.attention.q.weight") -> weight name, "{layer}" for the layer.
        derived: weight names, with "{layer}", that old checkpoints hold and that follow from the config.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Attributes], DecoderConfig]
    keys: Mapping[str, str]
    derived: tuple[str, ...] = ()


def read_rope(parameters: Any, where: str) -> Rope:
    """The rope of transformers 5's `rope_parameters` (one rope for all layers)."""
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where}: rope_parameters is {parameters!r}, not an object")
    values = {key: value for key, value in parameters.items() if key != "type"}
    rope = Attributes(values, {}, f"{where} (rope_parameters)")
    theta = rope.get("rope_theta")
    kind = rope.choose("rope_type", {name: name for name in ("default", "linear", "llama3")})
    options: dict[str, Any] = {}
    if kind in ("linear", "llama3"):
        options["factor"] = rope.get("factor")
    if kind == "llama3":
        options["low_frequency_factor"] = rope.get("low_freq_factor")
        options["high_frequency_factor"] = rope.get("high_freq_factor")
        options["original_length"] = rope.get("original_max_position_embeddings")
    rope.finish()
    return Rope(theta=theta, kind=kind, **options)


def read_llama(attributes: Attributes, where: str = "config.json") -> DecoderConfig:
    """Llama 2, 3, 3.1, 3.2 and everything that ships as LlamaForCausalLM (SmolLM2)."""
    # Tensor-parallel slicing of the training code; the sum over slices is the plain product.
    attributes.require("pretraining_tp", 1)
    rope = read_rope(attributes.get("rope_parameters"), where)
    sizes = {
        "vocab_size": attributes.get("vocab_size"),
        "width": attributes.get("hidden_size"),
        "mlp_width": attributes.get("intermediate_size"),
        "num_layers": attributes.get("num_hidden_layers"),
        "num_heads": attributes.get("num_attention_heads"),
        "num_kv_heads": attributes.get("num_key_value_heads"),
        "head_size": attributes.get("head_dim"),
        "max_positions": attributes.get("max_position_embeddings"),
    }
    options = {
        "activation": attributes.choose("hidden_act", HF_ACTIVATIONS),
        "norm_epsilon": attributes.get("rms_norm_eps"),
        "attention_bias": attributes.get("attention_bias"),
        "mlp_bias": attributes.get("mlp_bias"),
        "tied_embeddings": attributes.get("tie_word_embeddings"),
    }
    attributes.finish()
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where}: {name} is {value!r}, not a whole number")
    try:
        return DecoderConfig(**sizes, **options, rope=rope)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


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
        raise UserError(
            f"{where}: model type {model_type!r} is not supported; supported families: {known}"
        )
    return family
