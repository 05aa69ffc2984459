"""Which parameter of a transformers model holds a measured weight, for every family.

Written from transformers' modeling code, not from our key tables, so that an error there is not repeated
here. Names are Llama's for all families, as in the results.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from jaxgrad.gradients.selection import GROUPS
from jaxgrad.projections import ATTENTION, HEAD, MLP, MatrixAddress

_LAYER_WEIGHT = re.compile(
    r"(?:model|language_model|gpt_neox|transformer)\.(?:layers|h)\.(\d+)\.(.+)\.weight"
)
_OWN_WEIGHT = re.compile(rf"(?:self_attn|mlp)\.({'|'.join((*ATTENTION, *MLP))})_proj")
Part = Callable[[torch.Tensor], torch.Tensor]


class Weight(NamedTuple):
    """One measured weight.

    Attributes:
        name: Llama's name for it.
        parameter_name: the model's own name of the parameter that holds it.
        projection: one of `PROJECTION_NAMES`.
        layer: from 0; None for lm_head.
        parameter: the `nn.Parameter` that holds it, alone or with others.
        part: takes this weight out of the parameter or its gradient, as [outputs, inputs].
    """

    name: str
    parameter_name: str
    projection: str
    layer: int | None
    parameter: Any
    part: Part

    def gradient(self) -> torch.Tensor:
        """The gradient after a backward pass, [outputs, inputs]."""
        return self.part(self.parameter.grad)


def llama_name(projection: str, layer: int | None) -> str:
    """Llama's name for a weight."""
    if projection == HEAD:
        return f"{HEAD}.weight"
    block = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}_proj.weight"


def select_weights(model: Any, parameters: str) -> list[Weight]:
    """The weights that `--parameters` names, in the order of the results' matrices table."""
    config = model.config.get_text_config()
    weights = []
    for name, parameter in model.named_parameters():  # a tied head is not among them
        match = _LAYER_WEIGHT.search(name)
        if match and "vision" not in name:
            for projection, part in _parts(match[2], config).items():
                layer = int(match[1])
                llama = llama_name(projection, layer)
                weights.append(Weight(llama, name, projection, layer, parameter, part))
        elif name == llama_name(HEAD, None):
            weights.append(Weight(name, name, HEAD, None, parameter, _whole))

    def wanted(weight: Weight) -> bool:
        if parameters in GROUPS:
            return weight.projection in GROUPS[parameters]
        return re.search(parameters, weight.name) is not None

    def order(weight: Weight) -> tuple:
        return MatrixAddress(weight.layer, weight.projection).order

    return sorted(filter(wanted, weights), key=order)


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values


def _rows(begin: int, end: int | None, values: torch.Tensor) -> torch.Tensor:
    return values[begin:end]


def _columns(begin: int, end: int | None, values: torch.Tensor) -> torch.Tensor:
    """Columns of a Conv1D's weight, which is stored as [inputs, outputs]."""
    return values[:, begin:end].T


def _by_head(which: int, num_heads: int, values: torch.Tensor) -> torch.Tensor:
    """One of q, k, v in GPT-NeoX, whose outputs are ordered (head, one of q k v, entry)."""
    return values.view(num_heads, 3, -1, values.shape[-1])[:, which].flatten(0, 1)


def _parts(module: str, config: Any) -> dict[str, Part]:
    """Projection -> its part, for one of a layer's weights; empty for norms."""
    match = _OWN_WEIGHT.fullmatch(module)
    if match:
        return {match[1]: _whole}
    if module == "self_attn.qkv_proj":
        head_size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        first = config.num_attention_heads * head_size
        second = first + config.num_key_value_heads * head_size
        bounds = {"q": (0, first), "k": (first, second), "v": (second, None)}
        return {name: partial(_rows, *bound) for name, bound in bounds.items()}
    if module == "mlp.gate_up_proj":
        half = config.intermediate_size
        return {"gate": partial(_rows, 0, half), "up": partial(_rows, half, None)}
    if module == "attention.query_key_value":
        heads = config.num_attention_heads
        return {name: partial(_by_head, i, heads) for i, name in enumerate("qkv")}
    if module == "attn.c_attn":
        width = config.hidden_size
        return {name: partial(_columns, i * width, (i + 1) * width) for i, name in enumerate("qkv")}
    single: dict[str, dict[str, Part]] = {
        "attention.dense": {"o": _whole},
        "mlp.dense_h_to_4h": {"up": _whole},
        "mlp.dense_4h_to_h": {"down": _whole},
        "attn.c_proj": {"o": partial(_columns, 0, None)},
        "mlp.c_fc": {"up": partial(_columns, 0, None)},
        "mlp.c_proj": {"down": partial(_columns, 0, None)},
    }
    return single.get(module, {})
