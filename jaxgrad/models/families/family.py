"""What a family is: a reader of its config and a table of its weights' names. Data, not code."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrad.models.families.attributes import Attributes


@dataclasses.dataclass(frozen=True)
class Key:
    """Which weight of a checkpoint a parameter of the decoder stands in, and how.

    Attributes:
        name: the weight's name, "{layer}" for the layer's number.
        members: the parameters that are fused in it along its outputs, in their order; empty for
            one that has it to itself.
        by_head: the members alternate head by head, as in GPT-NeoX; otherwise each is one block.
        transposed: stored [in, out], as in GPT-2; PyTorch's linear layers store [out, in].
    """

    name: str
    members: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the weight is the parameter, as it stands."""
        return not self.members and not self.transposed

    def split(self, values: np.ndarray, sizes: Sequence[int], num_heads: int) -> list[np.ndarray]:
        """The members of a weight (or of a bias), each with its outputs first.

        Args:
            values: the weight as the checkpoint holds it.
            sizes: outputs of each member; one entry without members.
            num_heads: heads of each member where they alternate.
        """
        if self.transposed:
            values = values.T
        if self.by_head:
            rows = values.reshape(num_heads, len(sizes), -1, *values.shape[1:])
            return [rows[:, i].reshape(sizes[i], *values.shape[1:]) for i in range(len(sizes))]
        return np.split(values, np.cumsum(sizes)[:-1])


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture as config reader and key table.

    Attributes:
        title: the models by the name that people use.
        architecture: the `architectures` entry in config.json.
        read_fields: attributes -> the fields of `DecoderConfig`.
        keys: decoder path ("layers.attention.q.weight") -> where it stands.
        derived: weight names, with "{layer}", that old checkpoints hold and the config implies.
        renames: beginnings of names in other generations of files -> as the table has them.
        ignored: beginnings of names that belong to other parts than the text decoder.
    """

    title: str
    model_type: str
    architecture: str
    read_fields: Callable[[Attributes], dict[str, Any]]
    keys: Mapping[str, Key]
    derived: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def canonical(self, name: str) -> str | None:
        """A weight's name as the key table has it; None for one that is not the decoder's."""
        if name.startswith(self.ignored or "\0"):
            return None
        for old, new in self.renames:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def expand_layers(template: str, num_layers: int) -> Iterator[str]:
    """A template's names: one a layer where it has "{layer}", itself where not."""
    if "{layer}" not in template:
        yield template
    else:
        for layer in range(num_layers):
            yield template.replace("{layer}", str(layer))
