"""The rope's attributes, in every generation of config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxgrad.models.config import Rope
from jaxgrad.models.families.attributes import Attributes, Rules, shown

# Microsoft's first Phi-3 files call longrope "su".
ROPE_KINDS = {name: name for name in ("default", "linear", "llama3", "longrope")}
ALIASES = {"su": "longrope"}
ORIGINAL = "original_max_position_embeddings"


def read_rope(
    attributes: Attributes,
    *,
    max_positions: int,
    theta: float = 10000.0,
    theta_name: str = "rope_theta",
    fraction: float = 1.0,
    fraction_name: str = "partial_rotary_factor",
    is_partial: bool = False,
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
        fraction_name: the family's top-level name for the rotated fraction.
        is_partial: whether the family can rotate a part of a head.
    """
    parts = []
    for name in ("rope_scaling", "rope_parameters"):
        value = attributes.get(name, None)
        if value is not None and not isinstance(value, Mapping):
            attributes.problem(f"{name} is {shown(value)}, not an object")
        elif value:
            parts.append(_part(attributes, name, value))
    base = attributes.agreed(theta_name, theta, parts, inner="rope_theta")
    rotated = attributes.agreed(
        fraction_name, fraction, parts, inner="partial_rotary_factor", optional=True
    )
    parts = parts or [_part(attributes, "rope_scaling", {})]
    readings = [
        _read(attributes, part, max_positions, base, rotated, is_partial=is_partial)
        for part in parts
    ]
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
    if attributes.get("rope_parameters", None) is None:
        local = Rope(attributes.number("rope_local_base_freq", local_theta))
        return local, read_rope(attributes, max_positions=max_positions, theta=global_theta)
    nested = attributes.part("rope_parameters", _rules(attributes))
    # Beside the two, transformers 5.0 leaves these, which say nothing.
    nested.require("rope_type", "default")
    nested.require("rope_theta", None)
    ropes = {}
    for name, old_name, theta in (
        ("full_attention", "rope_theta", global_theta),
        ("sliding_attention", "rope_local_base_freq", local_theta),
    ):
        part = nested.part(name, _rules(attributes))
        base = attributes.number(old_name, part.get("rope_theta", theta))
        if part.has("rope_theta") and part.number("rope_theta") != base:
            attributes.contradiction(
                {f"rope_parameters.{name}.rope_theta": part.get("rope_theta"), old_name: base}
            )
        rotated = attributes.agreed("partial_rotary_factor", 1.0, [part], optional=True)
        ropes[name] = _read(nested, part, max_positions, base, rotated, is_partial=False)
    attributes.include(nested)
    if attributes.get("rope_scaling", None) is not None:
        attributes.problem(
            "rope_scaling is given besides rope_parameters, which should hold all of it"
        )
    return ropes["sliding_attention"], ropes["full_attention"]


def _part(attributes: Attributes, name: str, value: Mapping[str, Any]) -> Attributes:
    return Attributes(value, attributes.where, _rules(attributes), f"{name}.")


def _rules(attributes: Attributes) -> Rules:
    """The rules of a rope's object. Which keys count follows from its kind."""
    return Rules(irrelevant=(), ropes=attributes.rules.ropes)


def _read(
    whole: Attributes,
    rope: Attributes,
    max_positions: int,
    theta: float,
    fraction: float,
    *,
    is_partial: bool,
) -> Rope:
    kind = _kind(rope)
    fields: dict[str, Any] = {"theta": theta, "kind": kind, "rotated_fraction": fraction}
    if fraction != 1.0 and not is_partial:
        whole.problem(f"partial_rotary_factor is {fraction}; understood: 1.0")
    if kind in ("linear", "llama3"):
        fields["factor"] = rope.number("factor")
    stated = whole.get(ORIGINAL, None)  # ropes of other kinds do not use it
    if kind == "llama3":
        fields["low_frequency_factor"] = rope.number("low_freq_factor")
        fields["high_frequency_factor"] = rope.number("high_freq_factor")
        original = rope.count(ORIGINAL, whole.count(ORIGINAL, max_positions))
        fields["original_length"] = original
        if stated is not None and stated != original:
            whole.contradiction({ORIGINAL: stated, f"the rope's {ORIGINAL}": original})
    if kind == "longrope":
        fields |= _longrope_fields(whole, rope, max_positions)
    whole.include(rope)
    if not whole.sound:
        return Rope(theta)  # a stand-in: `finish` will raise
    try:
        return Rope(**fields)
    except ValueError as error:
        whole.problem(str(error))
        return Rope(theta)


def _kind(rope: Attributes) -> Any:
    """The kind of a rope, under either name; None if it is not understood."""
    kinds = ROPE_KINDS | ALIASES
    kind = rope.choose("rope_type" if rope.has("rope_type") else "type", kinds, "default")
    old_name = rope.get("type", None)
    if kind is not None and old_name is not None and rope.choose("type", kinds) != kind:
        rope.contradiction({"rope_type": rope.get("rope_type"), "type": old_name})
    if rope.rules.ropes is not None and kind is not None:
        rope.limit(rope.rules.ropes.get(kind, ()))
    for name in rope.objects():
        rope.problem(f"{name} is an object, but all layers share one rope here")
    return kind


def _longrope_fields(whole: Attributes, rope: Attributes, max_positions: int) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753) as transformers reads it: the top-level length has priority."""
    inner = rope.count(ORIGINAL, max_positions)
    original = whole.count(ORIGINAL, inner)
    stretch = rope.number("factor", max_positions / original)
    if original == 1 and stretch > 1:
        whole.problem(f"{ORIGINAL} is 1, which no stretch is relative to")
        stretch = 1.0
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        "original_length": original,
        "short_factors": rope.numbers("short_factor"),
        "long_factors": rope.numbers("long_factor"),
        "magnitude": rope.number("attention_factor", magnitude),
    }
