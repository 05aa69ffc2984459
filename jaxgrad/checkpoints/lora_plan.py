"""Which weights of a base a LoRA adapter changes, by its tensors' names and shapes and its config."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Set

from jaxgrad.checkpoints.key_table import known_names, wanted_weights
from jaxgrad.checkpoints.lora_config import LoraConfig
from jaxgrad.checkpoints.prefixes import fit_name
from jaxgrad.checkpoints.sources import ADAPTER_CONFIG, SafetensorsFiles
from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families import Family

PEFT_LEAD = "base_model.model."
ALL_LINEAR = "all-linear"
# The parts of an adapter, as PEFT names them behind the module's name.
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer)?\.(weight|bias)")
# Layers that read their inputs by index.
EMBEDDINGS = ("embedding", "position_embedding")
MOST_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Lora:
    """The LoRA of one weight.

    Attributes:
        left: name of the tensor whose entries belong to the weight's rows, or of `lora_B.bias`.
        right: name of the other; None for a bias.
        scale: a factor.
        flipped: rows of the weight are inputs, so `left` is A and both are transposed.
    """

    left: str
    right: str | None
    scale: float
    flipped: bool


@dataclasses.dataclass(frozen=True)
class Merge:
    """Which weights of a base an adapter changes, by their names in the family's key table.

    Attributes:
        loras: weight -> what is added to it.
        whole: weight -> the adapter's tensor that replaces it.
        saved: those of `whole` that are modules_to_save.
        notes: what was stripped or left out of account, in words.
    """

    loras: Mapping[str, Lora]
    whole: Mapping[str, str]
    saved: Set[str]
    notes: tuple[str, ...]


def plan_merge(
    lora: LoraConfig, tensors: SafetensorsFiles, family: Family, config: DecoderConfig
) -> Merge:
    """Find which weights an adapter changes. Reads no values.

    Args:
        lora: the adapter's config.
        tensors: the adapter's weights.
        family: of the base.
        config: of the base.

    Raises:
        UserError: tensors are unknown, missing, of another shape, or for modules that the config does not
            name; one line names all.
    """
    planner = _Planner(lora, tensors, family, config)
    if planner.problems:
        listed = "; ".join(planner.problems[:MOST_NAMED])
        more = len(planner.problems) - MOST_NAMED
        raise UserError(
            f"{tensors.where} does not fit {ADAPTER_CONFIG} and the base's "
            f"{family.architecture}: {listed}{f'; and {more} more' if more > 0 else ''}; give the base "
            "that it was trained on as --base_model_path, and all of the adapter's files"
        )
    return planner.merge()


class _Planner:
    """Maps an adapter's tensors to weights and collects what is wrong with them."""

    def __init__(
        self, lora: LoraConfig, tensors: SafetensorsFiles, family: Family, config: DecoderConfig
    ) -> None:
        self._config, self._tensors, self._family = lora, tensors, family
        self._weights = wanted_weights(config, family)
        self._known = known_names(config, family)
        self._embeddings = {family.keys[p].name for p in EMBEDDINGS if p in family.keys}
        self._head = family.keys["lm_head.weight"].name
        self._shapes = tensors.shapes()
        self.problems: list[str] = []
        self._edits: set[str] = set()
        # weight -> part -> tensor; weight -> the module's name in the model that was trained.
        self._parts: dict[str, dict[str, str]] = {}
        self._modules: dict[str, str] = {}
        self._whole: dict[str, str] = {}
        self._saved: set[str] = set()
        for name in self._shapes:
            self._sort(name)
        self._loras = {weight: self._lora(weight) for weight in self._parts}
        self._biases = dict(self._bias_loras())
        self._check_targets()
        self._check_whole()

    def merge(self) -> Merge:
        notes = list(self._config.notes)
        if self._edits:
            notes.append(f"names of the adapter's weights read {', '.join(sorted(self._edits))}")
        loras = {weight: lora for weight, lora in self._loras.items() if lora is not None}
        if any(lora.scale == 0 for lora in loras.values()):
            notes.append("lora_alpha is 0 for some weights: the adapter changes nothing there")
        return Merge(loras | self._biases, self._whole, self._saved, tuple(notes))

    def _sort(self, name: str) -> None:
        """Put a tensor where it belongs."""
        why = self._tensors.why_unreadable(name)
        if why is not None:
            self.problems.append(f"{name} {why}")
            return
        part = _PART.fullmatch(name)
        whole = None if part else _WHOLE.fullmatch(name)
        match = part or whole
        if match is None:
            self.problems.append(f"{name} is not a weight of LoRA")
            return
        kind = "weight" if part else match[2]
        weight, edits = fit_name(
            f"{match[1].removeprefix(PEFT_LEAD)}.{kind}", self._family, self._known
        )
        if weight is None:
            return  # outside the text decoder
        if weight not in self._weights and weight != self._head:
            self.problems.append(f"{name} belongs to no weight of the base")
            return
        self._edits.update(edits)
        module = match[1].removeprefix(PEFT_LEAD)
        taken = self._parts.setdefault(weight, {}) if part else self._whole
        key = match[2] if part else weight
        if key in taken:
            self.problems.append(f"{name} and {taken[key]} are the same weight")
        taken[key] = name
        if part:
            self._modules[weight] = module
        elif self._config.saves(module):
            self._saved.add(weight)
        elif not self._saved_anyway(weight):
            self.problems.append(f"{name} is not in modules_to_save")

    def _saved_anyway(self, weight: str) -> bool:
        """Whether PEFT may save a weight whole that is not in modules_to_save."""
        if weight.endswith(".bias"):
            return self._config.bias != "none"
        # After the vocabulary was resized, or if the embedding has LoRA.
        return weight in self._embeddings or weight == self._head

    def shape(self, weight: str) -> tuple[int, ...]:
        """Shape of the weight that the LoRA is added to."""
        if weight in self._whole:
            return self._shapes[self._whole[weight]]
        if weight not in self._weights:  # a tied head
            weight = self._family.keys["embedding"].name
        return self._weights[weight].shape

    def _lora(self, weight: str) -> Lora | None:
        """What is added to a weight; None if it has problems."""
        parts, module = self._parts[weight], self._modules[weight]
        indexed = weight in self._embeddings
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if indexed
            else ("lora_A.weight", "lora_B.weight")
        )
        allowed = {*names, "lora_B.bias"} if self._config.lora_bias and not indexed else {*names}
        before = len(self.problems)
        for part in sorted(parts.keys() - allowed):
            self.problems.append(f"{parts[part]} is not expected for that layer")
        for name, partner in (names, names[::-1]):
            if name not in parts and partner in parts:
                self.problems.append(f"{parts[partner]} has no partner {name}")
        shape = self.shape(weight)
        if len(shape) != 2:
            self.problems.append(f"{module} is not a linear layer or an embedding")
        if len(self.problems) > before or not parts.keys() >= set(names):
            return None
        flipped = indexed or (weight in self._weights and self._weights[weight].key.transposed)
        outputs, inputs = shape[::-1] if flipped else shape
        ranks = self._config.ranks(module)
        found = self._shapes[parts[names[0]]]
        rank = found[0] if found and found[0] in ranks else ranks[0]
        for name, wanted in zip(names, ([rank, inputs], [outputs, rank]), strict=True):
            if list(self._shapes[parts[name]]) != wanted:
                self.problems.append(
                    f"{parts[name]} is {list(self._shapes[parts[name]])}, expected {wanted} (rank {rank} "
                    "by r and rank_pattern)"
                )
        a, b = (parts[name] for name in names)
        left, right = (a, b) if flipped else (b, a)
        scale = self._config.scale(rank, self._config.alpha_of(module))
        return Lora(left, right, scale, flipped)

    def _bias_loras(self) -> Iterator[tuple[str, Lora]]:
        """What lora_bias adds to the biases."""
        for weight, parts in self._parts.items():
            name = parts.get("lora_B.bias")
            lora = self._loras[weight]
            if name is None or lora is None:
                continue
            bias = weight.removesuffix("weight") + "bias"
            if bias not in self._weights:
                self.problems.append(f"{name} is for a bias, but the layer has none")
            elif self._shapes[name] != self._weights[bias].shape:
                wanted = list(self._weights[bias].shape)
                self.problems.append(f"{name} is {list(self._shapes[name])}, expected {wanted}")
            else:
                yield bias, Lora(name, None, lora.scale, False)

    def _check_targets(self) -> None:
        """That the tensors are those of the modules that target_modules names, and all of them."""
        targets = self._config.target_modules
        if targets is None:
            return
        renamed = self._renamed_prefixes()
        linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        for weight, key in self._weights.items():
            if not weight.endswith(".weight") or len(key.shape) != 2:
                continue
            module = self._modules.get(weight, _written(weight, renamed).removesuffix(".weight"))
            if linear:
                wanted = weight not in self._embeddings and weight != self._head
            else:
                wanted = self._config.targets(module)
            if wanted and weight not in self._parts:
                self.problems.append(
                    f"{module} is in target_modules, but the file has no LoRA for it"
                )
            if not wanted and weight in self._parts:
                self.problems.append(f"{module} has LoRA, but is not in target_modules")

    def _renamed_prefixes(self) -> dict[str, str]:
        """Prefix in the key table -> prefix in the model that was trained, where they differ."""
        renamed = {}
        for weight, module in self._modules.items():
            written = f"{module}.weight"
            if written == weight:
                continue
            common = 0
            for ours, theirs in zip(weight[::-1], written[::-1], strict=False):
                if ours != theirs:
                    break
                common += 1
            renamed[weight[: len(weight) - common]] = written[: len(written) - common]
        return renamed

    def _check_whole(self) -> None:
        """That modules_to_save are there."""
        for weight in self._weights:
            module = weight.rpartition(".")[0]
            named = any(f".{end}." in f".{module}." for end in self._config.modules_to_save)
            if named and weight not in self._whole:
                self.problems.append(f"{weight} is in modules_to_save, but not in the file")


def _written(weight: str, renamed: Mapping[str, str]) -> str:
    """A weight's name in the model that was trained."""
    for ours, theirs in renamed.items():
        if weight.startswith(ours):
            return theirs + weight.removeprefix(ours)
    return weight
