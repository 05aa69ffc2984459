"""Model families: how a config.json becomes a `DecoderConfig`, and what each weight is called.

A new family needs a reader of its config (`llama_like`, `gemma`, `gpt`), a table of weight names, and a
renewed list of what transformers reads (`reads`). An attribute that transformers reads, and that is neither
read here nor neutral, is an error (`attributes`). So is a weight that the table does not list
(`jaxgrad.checkpoints.key_table`).
"""

from typing import Any

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families.attributes import Attributes, shown
from jaxgrad.models.families.family import Family, Key, expand_layers
from jaxgrad.models.families.gemma import GEMMAS
from jaxgrad.models.families.gpt import GPTS
from jaxgrad.models.families.llama_like import LLAMA_LIKE
from jaxgrad.models.families.reads import rules_for

__all__ = [
    "FAMILIES",
    "Family",
    "Key",
    "config_notes",
    "expand_layers",
    "family_of",
    "ignored_attributes",
    "read_config",
]

FAMILIES = {family.model_type: family for family in (*LLAMA_LIKE, *GEMMAS, *GPTS)}

# Names of the number of experts in configs of mixture-of-experts models.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_IGNORED = 40  # names in a note


def read_config(raw: dict[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """The family and the decoder config that a config.json describes.

    Args:
        raw: content of the config.json.
        where: its path, for messages.

    Raises:
        UserError: the model type, the sizes or any attributes are not understood. One line names all.
    """
    family, fields, _ = _read(raw, where)
    try:
        return family, DecoderConfig(**fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}; no model can have such sizes") from error


def ignored_attributes(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """The attributes of a config.json that transformers does not read for its model type.

    Raises:
        UserError: as `read_config`.
    """
    return _read(raw, where)[2]


def config_notes(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """A line that names the ignored attributes; none if there are none.

    Raises:
        UserError: as `read_config`.
    """
    ignored = ignored_attributes(raw, where)
    if not ignored:
        return ()
    names = [
        name if name.isidentifier() and len(name) < 80 else shown(name)
        for name in ignored[:MOST_IGNORED]
    ]
    more = f" and {len(ignored) - len(names)} more" if len(names) < len(ignored) else ""
    return (
        f"config: ignored, because transformers does not read them for {raw['model_type']}: "
        f"{', '.join(names)}{more}",
    )


def _read(raw: dict[str, Any], where: str) -> tuple[Family, dict[str, Any], tuple[str, ...]]:
    family = family_of(raw, where)
    rules = rules_for(family.model_type, raw.get("transformers_version"))
    attributes = Attributes(raw, where, rules)
    fields = family.read_fields(attributes)
    _check_architectures(attributes, family, bool(fields["tied_embeddings"]))
    attributes.finish()
    return family, fields, tuple(attributes.ignored)


def _check_architectures(attributes: Attributes, family: Family, tied: bool) -> None:
    """Note a problem unless `architectures` names the family's class.

    PyTorch's `AutoModelForCausalLM` goes by the model type alone. The class says which weights the files
    hold: a wrapper's prefix (FSDPLlamaForCausalLM) changes nothing, and a decoder without a head
    (LlamaModel) is complete if the head is tied to the embedding.
    """
    named = attributes.get("architectures", None)
    for name in named if isinstance(named, list) else [named]:
        text = f"architectures has {shown(name)}"
        if name is None or (isinstance(name, str) and name.endswith(family.architecture)):
            continue
        if isinstance(name, str) and name.endswith(family.headless) and name:
            if not tied:
                attributes.problem(
                    f"{text}, a decoder without lm_head (tie_word_embeddings is false); "
                    f"understood: {family.architecture}"
                )
        else:
            attributes.problem(f"{text}; understood: {family.architecture}")


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The family of a config.

    Raises:
        UserError: it is none of `FAMILIES`, which the message lists.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    experts = next((name for name in EXPERT_COUNTS if raw.get(name)), None)
    if model_type is None:
        what = "no model_type"
    elif experts is not None or (isinstance(model_type, str) and "moe" in model_type):
        count = f" ({experts} = {raw[experts]})" if experts else ""
        what = (
            f"model type {model_type!r} is a mixture of experts{count}: not supported, because an "
            "expert's gradient depends on which tokens its router sends it"
        )
    else:
        what = f"model type {model_type!r}: not supported"
    known = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
    raise UserError(f"{where}: {what}; give a model of a supported family: {known}")
