"""The models and records of the benchmarks: given ones, or random ones of published shapes.

A random model has no tokenizer. Its examples are texts of token ids, such as "17 4711", and its tokenizer
reads numbers. So they take the way of any other records, in jaxgrad and in PyTorch.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from _common import counts, torch_device
from absl import flags

from jaxgrad.data.examples import Example, Message
from jaxgrad.data.read import read_examples
from jaxgrad.errors import UserError

# From the config.json of each. What is not here has its family's default.
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
_SMOL = {
    "rope_theta": 100000,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

_LLAMA31 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _LLAMA | _SMOL | _sizes(576, 1536, 30, 9, 3),
    "SmolLM2-360M": _LLAMA | _SMOL | _sizes(960, 2560, 32, 15, 5),
    "Qwen2.5-0.5B": _QWEN | _sizes(896, 4864, 24, 14, 2),
    "Qwen2-1.5B": _QWEN | _sizes(1536, 8960, 28, 12, 2),
    "Llama-3.1-8B": _LLAMA | _LLAMA31 | _sizes(4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": _LLAMA | _LLAMA31 | _sizes(8192, 28672, 80, 64, 8),
    "gemma-2-9b": _sizes(3584, 14336, 42, 16, 8)
    | {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a benchmark: a model, its records, and the same model in PyTorch.

    Attributes:
        label: what the table calls it.
        model: a `LoadedModel`.
        torch_model: None where PyTorch is not asked or cannot run on this kind of device.
        num_parameters: of the model.
        num_tokens: of a random example, None for records.
    """

    label: str
    model: Any
    torch_model: Any
    examples: Sequence[Example]
    num_parameters: int
    num_tokens: int | None


def options_for(model: Any) -> Any:
    """`AnalyzeOptions`: the defaults for this model."""
    from jaxgrad.options import AnalyzeOptions

    return AnalyzeOptions(dtype=model.dtype).fitted_to(model.config.max_positions)


def cases(*, with_torch: bool) -> Iterator[Case]:
    """What the flags of records and shapes ask for, one model at a time.

    Raises:
        UserError: a flag, a file or a model that is wrong.
    """
    values = flags.FLAGS
    device = torch_device() if with_torch else None
    if values.data_path:
        yield from _file_cases(device)
        return
    lengths = counts("tokens")
    if values.responses >= min(lengths):
        raise UserError(f"--responses={values.responses} leaves no prompt in {min(lengths)} tokens")
    for name in values.shapes:
        model, torch_model, num_parameters = random_models(
            name, dtype=values.dtype, layers=values.layers, device=device
        )
        for num_tokens in lengths:
            yield Case(
                f"{name}, T={num_tokens}",
                model,
                torch_model,
                random_examples(values.limit, num_tokens, values.responses, SHAPES[name]),
                num_parameters,
                num_tokens,
            )
        del model, torch_model  # before the next ones


def _file_cases(device: str | None) -> Iterator[Case]:
    from jaxgrad.checkpoints import load_model
    from jaxgrad.models.decoder import num_parameters

    values = flags.FLAGS
    data = [read_examples(path, limit=values.limit) for path in values.data_path]
    model, torch_model = load_model(values.model_path, dtype=values.dtype), None
    if device is not None:
        import torch

        from jaxgrad.reference import load_torch_model

        torch_model = load_torch_model(values.model_path)
        torch_model = torch_model.to(device=device, dtype=getattr(torch, values.dtype))
    for part in data:
        size = num_parameters(model.config)
        yield Case(part.path.name, model, torch_model, part.examples, size, None)


class NumberTokenizer:
    """A word is a token, and its number is the token's id."""

    chat_template = None
    truncation_side = "right"

    def encode(
        self, text: str, *, truncation: bool = False, max_length: int | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text of numbers."""
        token_ids = [int(word) for word in text.split()]
        return token_ids[:max_length] if truncation else token_ids


def random_examples(
    count: int, num_tokens: int, num_responses: int, raw: Mapping[str, Any]
) -> list[Example]:
    """Examples of `num_tokens` random tokens, the last `num_responses` of them the response."""
    rng, examples = np.random.default_rng(0), []
    for index in range(count):
        words = [str(token) for token in rng.integers(0, raw["vocab_size"], num_tokens)]
        prompt, response = words[:-num_responses], words[-num_responses:]
        turns = (Message("user", " ".join(prompt)),)
        examples.append(Example(index, f"{index:016x}", turns, " ".join(response)))
    return examples


def random_models(
    name: str, *, dtype: str, layers: int | None = None, device: str | None
) -> tuple[Any, Any, int]:
    """A `LoadedModel` with random weights, the same in PyTorch, and the number of parameters.

    Args:
        name: of `SHAPES`.
        dtype: of the weights.
        layers: how many, None for all.
        device: PyTorch's; None for no PyTorch model. A PyTorch model draws the weights, and ours copies
            them. Without one, ours draws them.
    """
    from jaxgrad.checkpoints import LoadedModel
    from jaxgrad.checkpoints.fill import fill_decoder
    from jaxgrad.checkpoints.key_table import CanonicalSource
    from jaxgrad.dtypes import DTYPES
    from jaxgrad.models.decoder import num_parameters
    from jaxgrad.models.families import read_config

    raw = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    family, config = read_config(raw, name)
    size = num_parameters(config)
    if device is None:
        torch_model = None
        graphdef, state = _random_decoder(config, DTYPES[dtype])
    else:
        torch_model = _random_torch_model(raw, dtype, device)
        source = CanonicalSource(_TorchSource(name, torch_model), family, config)
        graphdef, state, _ = fill_decoder(config, family, source, DTYPES[dtype])
    tokenizer: Any = NumberTokenizer()
    model = LoadedModel(name, config, graphdef, state, tokenizer, "random", dtype)
    return model, torch_model, size


def _random_decoder(config: Any, dtype: Any) -> tuple[Any, Any]:
    import jax

    from jaxgrad.models.decoder import abstract_decoder, named_parameters, with_parameters

    graphdef, abstract = abstract_decoder(config, dtype)
    arrays = {}
    for index, (name, value) in enumerate(named_parameters(abstract).items()):
        if "norm" in name:
            scale = 0.0 if name.endswith("bias") or config.norm == "rms_plus_one" else 1.0
            arrays[name] = jax.numpy.full(value.shape, scale, dtype)
        else:
            draw = jax.jit(
                lambda key, shape=value.shape: 0.02 * jax.random.normal(key, shape, dtype)
            )
            arrays[name] = draw(jax.random.key(index))
    return graphdef, with_parameters(abstract, jax.block_until_ready(arrays))


def _random_torch_model(raw: dict[str, Any], dtype: str, device: str) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
    return model.eval()


class _TorchSource:
    """A PyTorch model's weights, as `jaxgrad.checkpoints.fill` reads them."""

    def __init__(self, where: str, model: Any) -> None:
        self.where = where
        # Not state_dict: it names a tied head a second time.
        self._tensors = dict(model.named_parameters())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        import ml_dtypes

        is_half = str(self._tensors[name].dtype) == "torch.bfloat16"
        return np.dtype(ml_dtypes.bfloat16 if is_half else np.float32)

    def why_unreadable(self, name: str) -> str | None:
        return None

    def read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach().cpu()
        if tensor.dtype == torch.bfloat16:  # which NumPy does not know
            return tensor.view(torch.int16).numpy().view(self.dtype(name))
        return tensor.numpy()

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        yield self.read(name)
