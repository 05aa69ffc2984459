"""Model families: how a config.json becomes a `DecoderConfig`, and what each weight is called.

A new family needs a reader of its config (`llama_like`, `gemma`, `gpt`) and a table of weight names. An
attribute that is neither read nor neutral is an error (`attributes`), and so is a weight that the table
does not list (`jaxgrad.checkpoints.fill`).
"""

from typing import Any

from transformers import CONFIG_MAPPING

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.family import Family, Key, expand_layers
from jaxgrad.models.families.gemma import GEMMAS
from jaxgrad.models.families.gpt import GPTS
from jaxgrad.models.families.llama_like import LLAMA_LIKE

__all__ = ["FAMILIES", "Family", "Key", "expand_layers", "family_of", "read_config"]

FAMILIES = {family.model_type: family for family in (*LLAMA_LIKE, *GEMMAS, *GPTS)}

# Names of the number of experts in configs of mixture-of-experts models.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_config(raw: dict[str, Any], where: str) -> tuple[Family, DecoderConfig]:
    """The family and the decoder config that a config.json describes.

    Args:
        raw: content of the config.json.
        where: its path, for messages.

    Raises:
        UserError: the model type, the sizes or any attributes are not understood. One line names all.
    """
    family = family_of(raw, where)
    # An attribute that the family does not read may have the value that is transformers' default.
    attributes = Attributes(raw, CONFIG_MAPPING[family.model_type]().to_dict(), where)
    if attributes.get("architectures", None) not in (None, []):
        attributes.require("architectures", [family.architecture])
    fields = family.read_fields(attributes)
    attributes.finish()
    try:
        return family, DecoderConfig(**fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}; no model can have such sizes") from error


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
