"""Which two sets may be compared, and which of their examples belong together."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.analysis.example_set import ExampleSet
from jaxgrad.errors import UserError

# The options that an example's statistics depend on, besides the loss. Others (method, batch_tokens, date,
# what is stored besides) change them by rounding at most.
_OPTIONS = ("protocol", "chat", "max_length", "dtype", "precision")


@dataclass(frozen=True)
class Pairs:
    """Places in the first and the second set of the examples that belong together.

    Attributes:
        first, second: int64 [pairs].
        by: What they have in common: "instruction" or "response tokens".
    """

    first: np.ndarray
    second: np.ndarray
    by: str

    def __len__(self) -> int:
        return len(self.first)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """As `bootstrap` takes them."""
        return self.first, self.second


def pair_by_instruction(first: ExampleSet, second: ExampleSet) -> Pairs:
    """Pairs the examples of equal instruction (the text, character by character).

    | case | paired |
    |---|---|
    | an instruction twice in both files | first with first, second with second, by data file order |
    | its first example was skipped in one run | the second ones still are a pair, the first ones none |
    | more often in one file | the surplus has no partner |
    | an instruction that is unknown (null) | never |
    """
    key_second = zip(second.instructions, second.occurrence_E.tolist(), strict=True)
    place = {key: at for at, key in enumerate(key_second) if key[0] is not None}
    key_first = zip(first.instructions, first.occurrence_E.tolist(), strict=True)
    found = [(at, place[key]) for at, key in enumerate(key_first) if key in place]
    places = np.array(found, np.int64).reshape(-1, 2)
    return Pairs(places[:, 0], places[:, 1], "instruction")


def check_comparable(
    first: ExampleSet, second: ExampleSet, *, same_model: bool = True
) -> str | None:
    """Refuses two sets that differ in more than their data.

    Args:
        first: A set.
        second: Another.
        same_model: The model has to be the same too. False is for base against instruction-tuned: then
            `chat` may differ as well, because each model is asked in its own way.

    Returns:
        What could not be compared (a file in the authors' form says nothing of its run), or None.

    Raises:
        UserError: Another loss, protocol, chat, max_length, dtype, precision or model, or other layers
            or projections; the differences are named.
    """
    names = f"{first.label} and {second.label}"
    for what, one, other, remedy in (
        ("losses", first.loss_name, second.loss_name, "of one loss"),
        ("layers", _span(first.layers), _span(second.layers), "that measured the same matrices"),
        (
            "projections",
            ", ".join(first.projections),
            ", ".join(second.projections),
            "that measured the same matrices",
        ),
    ):
        if one != other:
            raise UserError(
                f"{names} have different {what}: {one} and {other}. Compare runs {remedy}."
            )
    identities = [examples.run.get("identity") for examples in (first, second)]
    if None in identities:
        unknown = [s.label for s, i in zip((first, second), identities, strict=True) if i is None]
        return f"protocol and model of {' and '.join(unknown)} unknown, so not compared"
    facts = [_facts(identity, same_model) for identity in identities if identity is not None]
    differences = [
        f"{name} {_shown(facts[0][name])} and {_shown(facts[1][name])}"
        for name in facts[0]
        if facts[0][name] != facts[1][name]
    ]
    if differences:
        raise UserError(
            f"{names} are not comparable: {'; '.join(differences)}. "
            "Analyze one of the data sets again with the other's settings."
        )
    return None


def _facts(identity: Mapping[str, Any], same_model: bool) -> dict[str, str | None]:
    options = identity.get("options", {})
    # As JSON text: it tells 1 from true.
    facts = {name: json.dumps(options[name]) if name in options else None for name in _OPTIONS}
    if not same_model:
        del facts["chat"]
    else:
        facts["model weights"] = identity.get("model", {}).get("weights_sha256")
        config = identity.get("model", {}).get("config")
        facts["model config"] = None if config is None else json.dumps(config, sort_keys=True)
    return facts


def _shown(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 24 else f"{value[:21]}..."


def _span(layers: tuple[int, ...]) -> str:
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
