"""Strict reading of a config.json: an attribute that is neither read nor neutral is an error.

The JSON is read directly, because transformers' config classes drop and rename attributes.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrad.errors import UserError

# Attributes that cannot change a gradient in eval mode: token ids, what a forward pass returns or caches,
# dropout, initialisation, text generation, provenance.
_IRRELEVANT = """
    torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    tokenizer_class transformers_version initializer_range _name_or_path name_or_path _commit_hash
    attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout classifier_dropout
    output_attentions output_hidden_states return_dict id2label label2id
    num_labels task_specific_params _attn_implementation attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled model_type transformers.js_config
    unsloth_fixed unsloth_version max_length max_new_tokens min_length do_sample temperature top_k
    top_p typical_p num_beams repetition_penalty length_penalty no_repeat_ngram_size
    num_return_sequences cache_implementation gradient_checkpointing
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())

# Attributes that mark a whole kind of model as not supported, and why.
REFUSED = {
    "auto_map": "the model brings code of its own, which jaxgrad never runs",
    "quantization_config": "quantized weights; give the model that they were made from",
}


MOST = 2**31 - 1  # largest int32


class _Required:
    """Stands for "no default"."""


REQUIRED = _Required()


class Attributes:
    """Reads attributes by name, and checks that those nobody read are neutral.

    A bad value is noted and a valid stand-in returned. `finish` raises all problems in one error.

    Args:
        values: attribute name -> value.
        neutral: attribute name -> the value that it may have without being read.
        where: the file, for messages.
        label: prefix of the names in messages, such as "rope_scaling.".
        irrelevant: names whose values do not matter.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        neutral: Mapping[str, Any],
        where: str,
        label: str = "",
        irrelevant: frozenset[str] = IRRELEVANT,
    ) -> None:
        self._values, self._neutral, self.where, self._label = values, neutral, where, label
        self._irrelevant = irrelevant
        self._read: set[str] = set()
        self._problems: list[str] = []

    def set_defaults(self, values: Mapping[str, Any]) -> None:
        """Set values for attributes that are absent."""
        self._values = {**values, **self._values}

    def has(self, name: str) -> bool:
        """Whether `name` is there, even if its value is null."""
        return name in self._values

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of `name`, or the default if it is absent; absent without a default is a problem."""
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            self.problem(f"{self._label}{name} is missing")
            return None
        return default

    def count(self, name: str, default: int | _Required = REQUIRED, *, most: int = MOST) -> int:
        """A positive integer. With a default, null means the default too."""
        value = self.get(name, default)
        if value is None and not isinstance(default, _Required):
            return default
        if _is_number(value, int) and 1 <= value <= most:
            return value
        bound = "" if most == MOST else f" up to {most}"
        return self._refuse(name, value, f"a positive whole number{bound}", 1)

    def optional_count(self, name: str, default: int | None) -> int | None:
        """A positive integer or null; the default if absent."""
        return None if self.get(name, default) is None else self.count(name, default or REQUIRED)

    def number(self, name: str, default: float | _Required = REQUIRED) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        if _is_number(value, int | float) and 0 < value <= sys.float_info.max:
            return float(value)
        return self._refuse(name, value, "a positive number", 1.0)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A positive finite number or null; the default if absent."""
        return None if self.get(name, default) is None else self.number(name, default or REQUIRED)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive finite numbers."""
        values = self.get(name)
        if isinstance(values, list) and all(
            _is_number(value, int | float) and 0 < value <= sys.float_info.max for value in values
        ):
            return tuple(map(float, values))
        return self._refuse(name, values, "a list of positive numbers", ())

    def by_layer(self, name: str, num_layers: int, choices: Sequence[Any]) -> list[Any] | None:
        """A list with one of `choices` per layer; None if absent or null."""
        values = self.get(name, None)
        if values is None:
            return None
        is_whole = isinstance(values, list) and len(values) == num_layers
        if is_whole and all(value in choices for value in values):
            return values
        listed = ", ".join(map(str, choices))
        return self._refuse(name, values, f"a list of {num_layers} of {listed}", None)

    def part(
        self, name: str, neutral: Mapping[str, Any], irrelevant: frozenset[str]
    ) -> "Attributes":
        """The attributes of the object under `name`. Pass it to `include` when it is read."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            value = self._refuse(name, value, "an object", {})
        return Attributes(value, neutral, self.where, f"{self._label}{name}.", irrelevant)

    def switch(self, name: str, default: bool | _Required = REQUIRED) -> bool:
        """True or false."""
        value = self.get(name, default)
        return (
            value if isinstance(value, bool) else self._refuse(name, value, "true or false", False)
        )

    def choose(self, name: str, choices: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """What `choices` has for `name`'s value; another value is a problem."""
        value = self.get(name, default)
        if isinstance(value, str) and value in choices:
            return choices[value]
        return self._refuse(name, value, f"one of {', '.join(choices)}", None)

    def require(self, name: str, expected: Any) -> None:
        """Note a problem unless `name` is absent or has this value."""
        value = self.get(name, expected)
        if value != expected:
            self.problem(f"{self._label}{name} is {shown(value)}; understood: {shown(expected)}")

    @property
    def sound(self) -> bool:
        """Whether no problem has been noted."""
        return not self._problems

    def problem(self, text: str) -> None:
        """Note a problem, for `finish` to raise."""
        if text not in self._problems:
            self._problems.append(text)

    def include(self, part: "Attributes") -> None:
        """Take over a part's problems, its unread attributes included."""
        part._check_unread()
        for text in part._problems:
            self.problem(text)

    def finish(self) -> None:
        """Raise one `UserError` for all problems, unread attributes included; nothing if there is none."""
        self._check_unread()
        if self._problems:
            raise UserError(
                f"{self.where}: attributes not understood: {'; '.join(self._problems)}. Refused, "
                "because the numbers would be another model's: give a model of a supported kind, "
                "or remove what cannot change its arithmetic"
            )

    def _refuse(self, name: str, value: Any, expected: str, stand_in: Any) -> Any:
        if name in self._values:
            self.problem(f"{self._label}{name} is {shown(value)}, not {expected}")
        return stand_in

    def _check_unread(self) -> None:
        for name, value in self._values.items():
            if name in self._read or name in self._irrelevant:
                continue
            text = f"{self._label}{name} = {shown(value)}"
            if name in REFUSED and value is not None:
                self.problem(f"{text} ({REFUSED[name]})")
            elif name not in REFUSED and name not in self._neutral:
                self.problem(f"{text} is not known")
            elif name in self._neutral and value != self._neutral[name]:
                self.problem(f"{text}; understood: {shown(self._neutral[name])}")


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value for messages: null for None, long ones cut."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
