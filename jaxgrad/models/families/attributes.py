"""Strict reading of a config.json: what transformers reads and we do not understand is an error.

The JSON is read directly, because transformers' config classes drop and rename attributes. `reads` knows
which attributes transformers reads for a model type. The others cannot change PyTorch's numbers: they are
collected, so that a run can name them.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxgrad.errors import UserError

# Attributes that transformers reads and that cannot change a gradient in eval mode: token ids, what a
# forward pass returns or caches, dropout, initialisation, heads of other tasks, provenance; `is_decoder`,
# because the families are causal anyway. Settings of text generation are in `reads`. A few that only say
# which tool wrote the file are here, too.
_IRRELEVANT = """
    torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    decoder_start_token_id tokenizer_class prefix transformers_version initializer_range
    _name_or_path name_or_path _commit_hash attention_dropout resid_pdrop embd_pdrop attn_pdrop
    hidden_dropout classifier_dropout token_classification_bias output_attentions
    output_hidden_states return_dict use_return_dict id2label label2id num_labels problem_type
    finetuning_task task_specific_params loss_type _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    gradient_checkpointing cache_implementation use_bfloat16 tf_legacy_loss xla_device model_type
    is_decoder
    transformers.js_config unsloth_fixed unsloth_version
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())

# Attributes that mark a whole kind of model as not supported, and why.
REFUSED = {
    "auto_map": "the model brings code of its own, which jaxgrad never runs",
    "quantization_config": "quantized weights; give the model that they were made from",
}


MOST = 2**31 - 1  # largest int32


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which attributes of an object need not be understood.

    Attributes:
        neutral: attribute -> the value that it may have without being read.
        irrelevant: names whose values do not matter.
        counts: the names that transformers reads. The others are ignored. None if any name may count.
        ropes: kind of rope -> the keys of its object that count; None if any may.
        aliases: second name -> name.
        advice: what else a refusal suggests.
    """

    neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    irrelevant: Collection[str] = IRRELEVANT
    counts: Collection[str] | None = None
    ropes: Mapping[str, Collection[str]] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    advice: str = ""


class _Required:
    """Stands for "no default"."""


REQUIRED = _Required()


class Attributes:
    """Reads attributes by name, and checks that those nobody read are neutral.

    A bad value is noted and a valid stand-in returned. `finish` raises all problems in one error.

    Args:
        values: attribute name -> value.
        where: the file, for messages.
        rules: for what nobody reads.
        label: prefix of the names in messages, such as "rope_scaling.".
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, rules: Rules = Rules(), label: str = ""
    ) -> None:
        self._values, self.where, self.rules, self._label = values, where, rules, label
        self._read: set[str] = set()
        self._problems: list[str] = []
        self._ignored: list[str] = []
        for other, name in rules.aliases.items():
            self._take_alias(other, name)

    @property
    def ignored(self) -> list[str]:
        """After `finish`: the names that transformers does not read, parts included."""
        return self._ignored

    def set_defaults(self, values: Mapping[str, Any]) -> None:
        """Set values for attributes that are absent."""
        self._values = {**values, **self._values}

    def limit(self, counts: Collection[str] | None) -> None:
        """Set the names that count, where they follow from a value."""
        self.rules = dataclasses.replace(self.rules, counts=counts)

    def agreed(
        self,
        name: str,
        default: float,
        parts: Sequence["Attributes"] = (),
        *,
        inner: str | None = None,
        optional: bool = False,
    ) -> float:
        """The number that an attribute has here or in a part. Given twice, it must agree.

        Args:
            name: here.
            default: the value if it is given nowhere.
            parts: objects that may hold it, too.
            inner: its name in the parts; None for the same. If it is another name, then that name here only
                repeats the value: transformers writes it and does not read it.
            optional: whether null here means the default. Null counts as absent beside a value in a part.
        """
        inner, found = inner or name, {}
        for part in parts:
            if part.has(inner):
                found[f"{part._label}{inner}".removeprefix(self._label)] = part.number(inner)
        is_null = self.has(name) and self.get(name, None) is None
        if self.get(name, None) is not None or (is_null and not found and not optional):
            found[name] = self.number(name)
        value = next(iter(found.values()), default)
        if inner != name and self.get(inner, None) is not None:
            found = found or {f"the default of {name}": value}
            found[inner] = self.number(inner)
        if len(set(found.values())) > 1:
            self.contradiction(found)
        return value

    def _take_alias(self, other: str, name: str) -> None:
        if other not in self._values:
            return
        self._read.add(other)
        value = self._values[other]
        if name not in self._values:
            self._values = {**self._values, name: value}
        elif self._values[name] != value:
            self.contradiction({other: value, name: self._values[name]})

    def contradiction(self, values: Mapping[str, Any]) -> None:
        """Note that values which mean the same differ."""
        listed = " and ".join(f"{self._label}{n} = {shown(v)}" for n, v in values.items())
        self.problem(f"{listed} contradict each other (remove the wrong one)")

    def has(self, name: str) -> bool:
        """Whether `name` is there, even if its value is null."""
        return name in self._values

    def objects(self) -> list[str]:
        """The names, as messages have them, of values that are objects."""
        return [
            f"{self._label}{n}" for n, value in self._values.items() if isinstance(value, Mapping)
        ]

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of `name`, or the default if it is absent; absent without a default is a problem."""
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            self.problem(f"{self._label}{name} is missing")
            return None
        return default

    def count(
        self,
        name: str,
        default: int | _Required = REQUIRED,
        *,
        least: int = 1,
        most: int = MOST,
    ) -> int:
        """A positive integer. With a default, null means the default too."""
        value = self.get(name, default)
        if value is None and not isinstance(default, _Required):
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some tools write all numbers as floats
        if _is_number(value, int) and least <= value <= most:
            return value
        bound = "" if most == MOST else f" up to {most}"
        kind = "a positive whole number" if least else "a whole number from 0"
        return self._refuse(name, value, kind + bound, 1)

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

    def part(self, name: str, rules: Rules) -> "Attributes":
        """The attributes of the object under `name`. Pass it to `include` when it is read."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            value = self._refuse(name, value, "an object", {})
        return Attributes(value, self.where, rules, f"{self._label}{name}.")

    def switch(self, name: str, default: bool | _Required = REQUIRED) -> bool:
        """True or false. Null is false, as in PyTorch, where false is the default."""
        value = self.get(name, default)
        if value is None and default is False:
            return False
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
        """Take over a part's problems, its unread attributes included, and what is ignored of it."""
        part._check_unread()
        for text in part._problems:
            self.problem(text)
        self._ignored.extend(name for name in part._ignored if name not in self._ignored)

    def finish(self) -> None:
        """Raise one `UserError` for all problems, unread attributes included; nothing if there is none."""
        self._check_unread()
        if self._problems:
            raise UserError(
                f"{self.where}: attributes not understood: {'; '.join(self._problems)}. Refused, "
                f"because the numbers would be another model's: {self.rules.advice}give a model of a "
                "supported kind, or remove what cannot change its arithmetic"
            )

    def _refuse(self, name: str, value: Any, expected: str, stand_in: Any) -> Any:
        if name in self._values:
            self.problem(f"{self._label}{name} is {shown(value)}, not {expected}")
        return stand_in

    def _check_unread(self) -> None:
        for name, value in self._values.items():
            if name in self._read or name in self.rules.irrelevant:
                continue
            text = f"{self._label}{name} = {shown(value)}"
            if name in REFUSED:
                if value is not None:
                    self.problem(f"{text} ({REFUSED[name]})")
            elif name in self.rules.neutral and value == self.rules.neutral[name]:
                continue
            elif self.rules.counts is not None and name not in self.rules.counts:
                self._ignored.append(f"{self._label}{name}")
            elif name in self.rules.neutral:
                self.problem(f"{text}; understood: {shown(self.rules.neutral[name])}")
            else:
                self.problem(f"{text} is not known")


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value for messages: null for None, long ones cut."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
