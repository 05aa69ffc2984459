"""adapter_config.json of a LoRA adapter: what changes the merge is read, or refused by name."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from jaxgrad.checkpoints.sources import ADAPTER_CONFIG, read_json_object
from jaxgrad.errors import UserError

# PEFT's own merge, for all that is not merged here.
MERGE_IN_PEFT = (
    "merge it with PEFT (PeftModel.from_pretrained, merge_and_unload, save_pretrained) and give the "
    "directory of the merged model"
)
# Methods that change no weight, so that there is nothing to merge.
PROMPT_METHODS = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
)
# Initial values for which PEFT changes the base weights when it makes the adapter.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
PLAIN_INIT = ("gaussian", "eva", "orthogonal")
# Variants of LoRA whose merge is another one: attribute -> the name for messages.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
}
# About training, initial values and versions. PEFT's merge reads none of them.
IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "task_type",
        # PEFT sets it by the kind of layer, whatever the file says.
        "fan_in_fan_out",
        # Of PEFT before 0.3; they told how the layers computed, not what.
        "enable_lora",
        "merge_weights",
    }
)
MOST_PATTERNS = 10_000
HIGHEST_RANK = 10**6
LONGEST_PATTERN = 2_000  # characters
PATTERN_SECONDS = 1.0  # that one match may take


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What of an adapter_config.json decides the merge.

    Attributes:
        where: the file.
        rank: of the modules that `rank_pattern` does not name.
        alpha: of the modules that `alpha_pattern` does not name.
        rank_pattern: regular expression -> rank.
        alpha_pattern: regular expression -> alpha.
        rank_stabilized: alpha is divided by the root of the rank.
        target_modules: names or ends of names, or a regular expression; None if the file has none.
        exclude_modules: the same for modules without LoRA.
        layers: the only layers with LoRA; None for all.
        layers_pattern: names of the list of layers, as regular expressions; empty for any.
        modules_to_save: ends of names of the modules that are saved whole.
        bias: "none", "all" or "lora_only": the biases that are saved whole.
        lora_bias: LoRA adds to biases as well.
        keeps_tied: a tied head stays tied to an embedding that the adapter changes.
        base: the base model's id or path; None if the file names none.
        base_revision: of the base's hub id.
        notes: what was left out of account, in words.
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    bias: str
    lora_bias: bool
    keeps_tied: bool
    base: str | None
    base_revision: str | None
    notes: tuple[str, ...]

    def ranks(self, module: str) -> list[int]:
        """The ranks that a module, by its name in the model that was trained, may have.

        The first pattern that matches counts, but PEFT sorts them when it saves, so any may have been the
        first.

        Raises:
            UserError: a pattern takes too long.
        """
        found = [rank for pattern, rank in self.rank_pattern.items() if self._ends(pattern, module)]
        return found or [self.rank]

    def alpha_of(self, module: str) -> float:
        """The alpha of a module.

        Raises:
            UserError: a pattern takes too long; patterns with several values match.
        """
        matching = [p for p in self.alpha_pattern if self._ends(p, module)]
        values = {self.alpha_pattern[pattern] for pattern in matching} or {self.alpha}
        if len(values) > 1:
            raise UserError(
                f"{self.where}: alpha_pattern has {len(values)} values for {module} "
                f"({', '.join(matching[:4])}): which one counted in training is not known, because PEFT "
                "sorts the patterns when it saves them; remove those that did not count"
            )
        return values.pop()

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of B A."""
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether a module is saved whole."""
        return any(
            module.endswith(end) or f".{end}." in f".{module}" for end in self.modules_to_save
        )

    def targets(self, module: str) -> bool:
        """Whether a module has LoRA, as PEFT chooses it. Call it only if `target_modules` is given.

        Raises:
            UserError: a pattern takes too long.
        """
        saved = any(f".{name}." in f".{module}." for name in self.modules_to_save)
        if saved or self._named(self.exclude_modules, module):
            return False
        if not self._named(self.target_modules, module):
            return False
        if self.layers is None or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            match = self._match(pattern, module, "layers_pattern")
            if match is not None:
                return int(match["idx"]) in self.layers
        return False

    def _named(self, names: tuple[str, ...] | str | None, module: str) -> bool:
        if isinstance(names, str):
            return self._match(rf"(?:{names})\Z", module, "target_modules") is not None
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    def _ends(self, pattern: str, module: str) -> bool:
        return self._match(rf"(.*\.)?({pattern})$", module, "rank_pattern") is not None

    def _match(self, pattern: str, module: str, what: str) -> Any:
        try:
            return regex.match(pattern, module, timeout=PATTERN_SECONDS)
        except TimeoutError as error:
            raise UserError(
                f"{self.where}: a regular expression in it ({pattern[:60]!r}) needs more than "
                f"{PATTERN_SECONDS:.0f} s for the name {module!r}; write it more simply"
            ) from error
        except regex.error as error:
            raise UserError(
                f"{self.where}: {what} {pattern[:60]!r} is no regular expression ({error}); correct it"
            ) from error


def read_lora_config(directory: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        UserError: it is no plain LoRA, or attributes are unknown or impossible; one line names all.
    """
    path = directory / ADAPTER_CONFIG
    raw = read_json_object(path)
    _refuse_other_methods(path, raw)
    reader = _Reader(raw)
    layers = reader.layers()
    config = LoraConfig(
        where=str(path),
        rank=reader.rank("r", raw.get("r", 8)),
        alpha=reader.number("lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern=reader.pattern("rank_pattern", reader.rank),
        alpha_pattern=reader.pattern("alpha_pattern", reader.number),
        rank_stabilized=reader.switch("use_rslora"),
        target_modules=reader.names("target_modules"),
        exclude_modules=reader.names("exclude_modules"),
        layers=layers,
        layers_pattern=_as_tuple(reader.names("layers_pattern")),
        modules_to_save=_as_tuple(reader.names("modules_to_save")),
        bias=reader.choice("bias", ("none", "all", "lora_only")),
        lora_bias=reader.switch("lora_bias"),
        keeps_tied=reader.switch("ensure_weight_tying"),
        base=reader.text("base_model_name_or_path"),
        base_revision=reader.text("revision"),
        notes=reader.unknown(),
    )
    if reader.problems:
        raise UserError(
            f"{path} is not understood: {'; '.join(reader.problems)}. Refused, because the merged "
            f"weights could be others: {MERGE_IN_PEFT}"
        )
    return config


def _refuse_other_methods(path: Path, raw: dict[str, Any]) -> None:
    method = raw.get("peft_type")
    if method != "LORA":
        if method in PROMPT_METHODS:
            raise UserError(
                f"{path}: {method} changes the input or the activations, not the weights, so it cannot "
                "be merged; only LoRA adapters are read: measure its base model instead"
            )
        raise UserError(
            f"{path}: the method (peft_type) is {method!r}; only LORA is merged here: {MERGE_IN_PEFT}"
        )
    variants = [f"{title} ({name})" for name, title in VARIANTS.items() if raw.get(name)]
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {init!r}, for which PEFT changed the base weights before the "
            "training, so the adapter does not fit the base as it is published; save it again with "
            f"path_initial_model_for_weight_conversion, or {MERGE_IN_PEFT}"
        )
    if variants:
        raise UserError(
            f"{path}: a variant of LoRA that is not merged here: {', '.join(variants)}; {MERGE_IN_PEFT}"
        )


def _is_off(value: Any) -> bool:
    """Whether the value of an unknown attribute can only mean that it is not used."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _as_tuple(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


class _Reader:
    """Reads attributes and collects what is wrong with them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw, self._read, self.problems = raw, {"peft_type", "init_lora_weights"}, list[str]()
        init = raw.get("init_lora_weights", True)
        if not (isinstance(init, bool) or init in PLAIN_INIT):
            self.problems.append(f"init_lora_weights is {init!r}")

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._raw.get(name)

    def _problem(self, name: str, value: Any, wanted: str) -> None:
        self.problems.append(f"{name} is {repr(value)[:60]}, not {wanted}")

    def rank(self, name: str, value: Any) -> int:
        """A whole number from 1 on."""
        self._read.add(name)
        if type(value) is not int or not 1 <= value <= HIGHEST_RANK:
            self._problem(name, value, f"a whole number from 1 to {HIGHEST_RANK}")
            return 1
        return value

    def number(self, name: str, value: Any) -> float:
        """A finite number."""
        self._read.add(name)
        if type(value) not in (int, float) or abs(value) > 1e30 or value != value:
            self._problem(name, value, "a finite number")
            return 1.0
        return float(value)

    def switch(self, name: str) -> bool:
        """True or false; false if it is not there."""
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            self._problem(name, value, "true or false")
        return value is True

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of the choices; the first if it is not there."""
        value = self._get(name)
        if value is None:
            return choices[0]
        if value not in choices:
            self._problem(name, value, f"one of {', '.join(choices)}")
        return str(value)

    def text(self, name: str) -> str | None:
        """A text that is not empty."""
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            self._problem(name, value, "a text")
            return None
        return value or None

    def names(self, name: str) -> tuple[str, ...] | str | None:
        """A list of names, or one text."""
        value = self._get(name)
        if isinstance(value, str):
            self._check_pattern(name, value)
            return value
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._problem(name, value, "a list of names")
            return None
        return tuple(value)

    def pattern(self, name: str, read: Any) -> dict[str, Any]:
        """Regular expression -> number."""
        value = self._get(name) or {}
        if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
            self._problem(name, value, f"a table of at most {MOST_PATTERNS} entries")
            return {}
        for key in value:
            self._check_pattern(name, key)
        numbers = {key: read(f"{name}[{key[:60]!r}]", number) for key, number in value.items()}
        return numbers

    def layers(self) -> frozenset[int] | None:
        """The layers with LoRA; None for all."""
        name = "layers_to_transform"
        value = self._get(name)
        listed = [value] if type(value) is int else value
        if listed in (None, []):
            return None
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            self._problem(name, value, "a list of whole numbers")
            return None
        return frozenset(listed)

    def _check_pattern(self, name: str, pattern: str) -> None:
        if len(pattern) > LONGEST_PATTERN:
            self._problem(name, pattern, f"shorter than {LONGEST_PATTERN} characters")
            return
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            self._problem(name, pattern, f"a regular expression ({error})")

    def unknown(self) -> tuple[str, ...]:
        """Notes on attributes that are unknown and off; those that are on are problems."""
        left = self._raw.keys() - self._read - IRRELEVANT - VARIANTS.keys()
        on = sorted(name for name in left if not _is_off(self._raw[name]))
        if on:
            listed = ", ".join(f"{name} = {repr(self._raw[name])[:60]}" for name in on)
            self.problems.append(f"unknown attributes ({listed})")
        off = sorted(left - set(on))
        return (f"unknown attributes that are off: {', '.join(off)}",) if off else ()
