"""What describes a family: a reader of its config and a table of its weights' names."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrad.models.families.attributes import Attributes


@dataclasses.dataclass(frozen=True)
class Key:
    """The checkpoint weight that holds a parameter of the decoder, and how.

    Attributes:
        name: the weight's name, "{layer}" for the layer's number.
        members: of a fused weight, the parameters in the order of its outputs; empty if not fused.
        by_head: the members alternate head by head, as in GPT-NeoX; else each is one block.
        transposed: stored [in, out], as in GPT-2; PyTorch's linear layers store [out, in].
    """

    name: str
    members: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the weight is the parameter, unchanged."""
        return not self.members and not self.transposed

    def split(self, values: np.ndarray, sizes: Sequence[int], num_heads: int) -> list[np.ndarray]:
        """The parameters in a weight or bias, each with its outputs first.

        Args:
            values: the weight as the checkpoint stores it.
            sizes: outputs of each parameter; one entry if the weight is not fused.
            num_heads: heads of each parameter, used if they alternate.
        """
        if self.transposed:
            values = values.T
        if self.by_head:
            rows = values.reshape(num_heads, len(sizes), -1, *values.shape[1:])
            return [rows[:, i].reshape(sizes[i], *values.shape[1:]) for i in range(len(sizes))]
        return np.split(values, np.cumsum(sizes)[:-1])


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        title: the models' common name.
        model_type: the entry in config.json.
        architecture: the class in `architectures` of config.json.
        read_fields: attributes -> the fields of `DecoderConfig`.
        keys: parameter ("layers.attention.q.weight") -> the checkpoint weight that holds it.
        derived: names, with "{layer}", of buffers that old checkpoints hold and the config implies.
        renames: name prefixes in other generations of files -> the prefixes in `keys`.
        ignored: name prefixes of weights outside the text decoder.
    """

    title: str
    model_type: str
    architecture: str
    read_fields: Callable[[Attributes], dict[str, Any]]
    keys: Mapping[str, Key]
    derived: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def headless(self) -> tuple[str, ...]:
        """Ends of the names of the classes that are this decoder without its head."""
        for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
            if self.architecture.endswith(end):
                stem = self.architecture.removesuffix(end)
                return (f"{stem}Model", f"{stem}TextModel")
        return ()

    def canonical(self, name: str) -> str | None:
        """A weight's name as `keys` has it; None for a weight outside the text decoder."""
        if name.startswith(self.ignored):
            return None
        for old, new in self.renames:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def expand_layers(template: str, num_layers: int) -> Iterator[str]:
    """The template's name for each layer; the template itself if it has no "{layer}"."""
    if "{layer}" not in template:
        yield template
    else:
        for layer in range(num_layers):
            yield template.replace("{layer}", str(layer))
