"""The rope's attributes, in every generation of config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxgrad.models.config import Rope
from jaxgrad.models.families.attributes import Attributes, shown

# Microsoft's first Phi-3 files call longrope "su".
ROPE_KINDS = {name: name for name in ("default", "linear", "llama3", "longrope")}
ALIASES = {"su": "longrope"}
NESTED = ("full_attention", "sliding_attention")


def read_rope(
    attributes: Attributes,
    *,
    max_positions: int,
    theta: float = 10000.0,
    theta_name: str = "rope_theta",
    fraction: float = 1.0,
    fraction_name: str | None = None,
) -> Rope:
    """The rope of a model whose layers share one.

    transformers 5 writes `rope_parameters`. Older versions write `rope_theta` and, for long contexts,
    `rope_scaling` with its kind under "type" or "rope_type". Values given twice must agree.

    Args:
        attributes: of the whole config.
        max_positions: the model's positions, if the rope does not give those of its training.
        theta: transformers' default for the family.
        theta_name: the family's top-level name for theta.
        fraction: default of the rotated fraction.
        fraction_name: the family's top-level name for the rotated fraction; None if the family always
            rotates whole heads.
    """
    parts = []
    for name in ("rope_scaling", "rope_parameters"):
        value = attributes.get(name, None)
        if value is not None and not isinstance(value, Mapping):
            attributes.problem(f"{name} is {shown(value)}, not an object")
        elif value:
            parts.append(Attributes(value, {}, attributes.where, f"{name}.", frozenset()))
    parts = parts or [Attributes({}, {}, attributes.where, "", frozenset())]
    names = (theta_name, fraction_name)
    readings = [_read(attributes, part, max_positions, theta, fraction, names) for part in parts]
    if readings[0] != readings[-1]:
        attributes.problem("rope_scaling and rope_parameters contradict each other")
    return readings[0]


def read_local_and_global_rope(
    attributes: Attributes, *, max_positions: int, local_theta: float, global_theta: float
) -> tuple[Rope, Rope]:
    """The ropes of windowed and of full layers (Gemma 3).

    Older files write `rope_local_base_freq` for windowed layers, `rope_theta` and `rope_scaling` for full
    ones; transformers 5 writes an object for each of the two into `rope_parameters`.
    """
    nested = attributes.get("rope_parameters", None)
    if nested is None:
        local = Rope(attributes.number("rope_local_base_freq", local_theta))
        return local, read_rope(attributes, max_positions=max_positions, theta=global_theta)
    part = attributes.part("rope_parameters", {}, frozenset())
    ropes = {}
    for name, theta in zip(NESTED, (global_theta, local_theta), strict=True):
        inner = part.part(name, {}, frozenset())
        ropes[name] = _read(part, inner, max_positions, theta, 1.0, ("rope_theta", None))
    attributes.include(part)
    for name in ("rope_scaling", "rope_theta", "rope_local_base_freq"):
        if attributes.get(name, None) is not None:
            attributes.problem(
                f"{name} is given besides rope_parameters, which should hold all of it"
            )
    return ropes["sliding_attention"], ropes["full_attention"]


def _read(
    whole: Attributes,
    rope: Attributes,
    max_positions: int,
    theta: float,
    fraction: float,
    names: tuple[str, str | None],
) -> Rope:
    fields: dict[str, Any] = {}
    theta_name, fraction_name = names
    if rope.has("rope_theta"):
        fields["theta"] = rope.number("rope_theta")
        whole.require(theta_name, rope.get("rope_theta"))
    else:
        fields["theta"] = whole.number(theta_name, theta)
    if fraction_name is None:
        rope.require("partial_rotary_factor", 1.0)
    elif rope.has("partial_rotary_factor"):
        fields["rotated_fraction"] = rope.number("partial_rotary_factor")
        whole.require(fraction_name, rope.get("partial_rotary_factor"))
    else:
        fields["rotated_fraction"] = whole.number(fraction_name, fraction)
    old_name, new_name = rope.get("type", None), rope.get("rope_type", None)
    if old_name is not None and new_name is not None:
        rope.require("type", new_name)
    key = "type" if new_name is None and old_name is not None else "rope_type"
    kind = rope.choose(key, ROPE_KINDS | ALIASES, "default")
    fields["kind"] = kind
    if kind in ("linear", "llama3"):
        fields["factor"] = rope.number("factor")
    if kind == "llama3":
        fields["low_frequency_factor"] = rope.number("low_freq_factor")
        fields["high_frequency_factor"] = rope.number("high_freq_factor")
        fields["original_length"] = rope.count("original_max_position_embeddings", max_positions)
    if kind == "longrope":
        fields |= _longrope_fields(whole, rope, max_positions)
    whole.include(rope)
    if not whole.sound:
        return Rope(fields["theta"])  # a stand-in: `finish` will raise
    try:
        return Rope(**fields)
    except ValueError as error:
        whole.problem(str(error))
        return Rope(fields["theta"])


def _longrope_fields(whole: Attributes, rope: Attributes, max_positions: int) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753) as transformers reads it: the top-level length has priority."""
    inner = rope.count("original_max_position_embeddings", max_positions)
    original = whole.count("original_max_position_embeddings", inner)
    stretch = rope.number("factor", max_positions / original)
    if original == 1 and stretch > 1:
        whole.problem("original_max_position_embeddings is 1, which no stretch is relative to")
        stretch = 1.0
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        "original_length": original,
        "short_factors": rope.numbers("short_factor"),
        "long_factors": rope.numbers("long_factor"),
        "magnitude": rope.number("attention_factor", magnitude),
    }
