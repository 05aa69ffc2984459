"""The authors' procedure in PyTorch: one example at a time, each weight's gradient, its full SVD.

Written from the paper's protocol, not from our stages, so that an error there is not repeated here. The
model is transformers' own, labels mask the prompt, and autograd gives the weights' own gradients.
transformers also reads GGUF files, if its reader takes in all that the file says (plain Llama).

Two things differ from the authors' code:

- The cross entropy is taken in float64. PyTorch's float32 kernel on the CPU sums exp(logit) over the
  vocabulary with a bias. At 49152 tokens it lowers the loss by 5e-6 of its value and moves a sigma_1 by up
  to 2e-4, ten times more than all other rounding (SmolLM2-135M, AQuA, against the model in float64). It
  would hide errors of ours. `wide_loss=False` takes it as the authors had it.
- Only singular values are computed. The authors' call also takes both full sets of singular vectors and
  drops them; `decomposition="svd"` does the same.
"""

import contextlib
import importlib.util
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal
from unittest import mock

import numpy as np

from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.places import resolve_model
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.data.examples import Example
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results import ExampleResult

INSTALL = "pip install '.[reference]'"

try:
    import torch
except ModuleNotFoundError as error:
    raise UserError(f"the comparison needs PyTorch, which is not installed: {INSTALL}") from error

from jaxgrad.reference.encoding import Encoding, encode_example  # noqa: E402
from jaxgrad.reference.losses import IGNORED_LABEL, torch_loss  # noqa: E402 - needs torch
from jaxgrad.reference.weights import Weight, select_weights  # noqa: E402

Decomposition = Literal["svdvals", "svd"]

UNDEFINED_BELOW = 1e-12  # with a nuclear norm below this there is no effective rank


def load_torch_model(model_path: str | None, *, dtype: str = "float32") -> Any:
    """The transformers model for a path, in eval mode with eager attention.

    Args:
        model_path: as `jaxgrad.load_model` takes it.
        dtype: "float32" or "float64".

    Raises:
        UserError: there is no such model, or a package for reading it is missing.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(model_path).path
    if SavedDecoder.is_one(path):
        raise UserError(
            f"--model_path {path} is a converted checkpoint, which PyTorch cannot read; give the "
            "model that it was converted from"
        )
    # Without `trust_remote_code` no code from the model's directory runs.
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "local_files_only": True,
    }
    if path.is_file() and not _transformers_reads(file := GgufFile(path)):
        model = _build_from_gguf(file)
        if dtype == "float64":
            _to_double(model)
        return model
    if path.is_file():
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(f"transformers reads a GGUF file only with accelerate: {INSTALL}")
        directory, options["gguf_file"] = str(path.parent), path.name
    else:
        directory = str(path)
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    if dtype == "float64":
        _to_double(model)
    return model


def _transformers_reads(file: GgufFile) -> bool:
    """Whether transformers' own GGUF reader takes in all that the file says.

    It does not read scaled ropes and biases of Llama files. Of other architectures it leaves out soft caps
    and query scales, or cannot load them at all.
    """
    attributes = file.hf_config().keys()
    return file.architecture == "llama" and not attributes & {
        "rope_scaling",
        "attention_bias",
        "mlp_bias",
    }


def _build_from_gguf(file: GgufFile) -> Any:
    """transformers' model with the config and weights that our own GGUF reader finds."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw = file.hf_config()
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = {name: torch.tensor(file.read(name)) for name in file.shapes()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise UserError(f"{file.where}: its weights do not fit transformers' {raw['model_type']}")
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def float32_means_float64() -> Iterator[None]:
    """Inside the block `torch.float32`, `torch.float` and `Tensor.float()` mean double precision.

    transformers' models say float32 and mean "at least float32": for the mean square of a norm, the
    softmax, the rotary frequencies and angles. After `model.double()` this rounds down, and the results
    are accurate to 1e-7 only. All Python code sees the changed names; PyTorch's kernels do not read them.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _to_double(model: Any) -> None:
    model.double()
    with float32_means_float64():
        for module in model.modules():
            # These were computed in float32. `double()` does not make them more accurate.
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(module.config)
            elif hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)


def measure_in_torch(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Example],
    options: AnalyzeOptions,
    *,
    wide_loss: bool = True,
    decomposition: Decomposition = "svdvals",
) -> Iterator[ExampleResult]:
    """The authors' loop.

    Args:
        model: from `load_torch_model`. Computes in its dtype, on its device.
        tokenizer: a `transformers` tokenizer.
        examples: from `read_examples`.
        options: protocol, chat, max_length, date, parameters, spectrum, extremes and loss are read.
        wide_loss: take the cross entropy in float64 (see the module's docstring).
        decomposition: "svdvals", or "svd" as the authors called it, with its defaults.

    Yields:
        One result for each example, in order, with the columns of `jaxgrad.results.columns` except
        rank_bound, which no SVD gives, and condition_number, which would be noise. `sigma_min` is what the
        SVD gives: noise if the rank is not full.

    Raises:
        UserError: an example cannot be encoded.
    """
    weights = differentiate_by(model, options.parameters)
    for example in examples:
        encoding = encode_example(example, tokenizer, options)
        if encoding.reason is not None:
            yield _result(example, encoding, "skipped", encoding.reason, None, {})
            continue
        loss = backward(model, encoding, wide_loss=wide_loss, loss=options.loss)
        finite = [bool(torch.isfinite(weight.gradient()).all()) for weight in weights]
        if math.isfinite(loss) and all(finite):
            described = _describe(weights, options, decomposition)
            yield _result(example, encoding, "ok", None, loss, described)
        else:  # PyTorch's SVD raises on a NaN
            reason = f"loss is {loss}, {finite.count(False)} gradients are not finite"
            yield _result(example, encoding, "non_finite", reason, None, {})


def differentiate_by(model: Any, parameters: str) -> list[Weight]:
    """Selects the weights that `parameters` names. Only these get gradients in `backward`."""
    weights = select_weights(model, parameters)
    model.requires_grad_(False)
    for weight in weights:
        weight.parameter.requires_grad_(True)
    return weights


def backward(
    model: Any, encoding: Encoding, *, wide_loss: bool = True, loss: str = "response_mean"
) -> float:
    """Forward and backward pass of one example.

    Gradients are left in the parameters that `differentiate_by` selected.

    Args:
        model: from `load_torch_model`.
        encoding: from `encode_example`.
        wide_loss: take the cross entropy in float64 (see the module's docstring).
        loss: a name in `TORCH_LOSSES`.

    Returns:
        The loss.
    """
    input_ids = torch.tensor([encoding.token_ids], device=model.device)
    labels = input_ids.clone()
    labels[:, : encoding.num_prompt_tokens] = IGNORED_LABEL
    is_double = model.dtype == torch.float64
    model.zero_grad(set_to_none=True)
    with float32_means_float64() if is_double else contextlib.nullcontext():
        logits = model(input_ids=input_ids, use_cache=False).logits
    logits_TV = logits[0, :-1].double() if wide_loss else logits[0, :-1]
    value = torch_loss(loss)(logits_TV, labels[0, 1:])
    value.backward()
    return value.item()


def _describe(
    weights: list[Weight], options: AnalyzeOptions, decomposition: Decomposition
) -> dict[str, list]:
    columns: dict[str, list] = {}
    for weight in weights:
        gradient = weight.gradient()
        row = {
            "layer": weight.layer,
            "projection": weight.projection,
            "rows": gradient.shape[0],
            "cols": gradient.shape[1],
            **_statistics(gradient, options, decomposition),
        }
        for column, value in row.items():
            columns.setdefault(column, []).append(value)
    return columns


def _statistics(
    gradient: torch.Tensor, options: AnalyzeOptions, decomposition: Decomposition
) -> dict[str, Any]:
    # The SVD in the model's dtype. The sums over its values in float64, so that they add no error.
    if gradient.dtype == torch.bfloat16:  # which has no SVD
        gradient = gradient.to(torch.float32)
    if decomposition == "svd":
        values = torch.linalg.svd(gradient).S
    else:
        values = torch.linalg.svdvals(gradient)
    sigma = values.cpu().numpy().astype(np.float64)
    entries = gradient.double()
    nuclear = float(sigma.sum())
    share = sigma[sigma > 0] / nuclear if nuclear else sigma[:0]
    frobenius = float(torch.linalg.matrix_norm(entries))
    has_rank = nuclear >= UNDEFINED_BELOW
    return {
        "nuclear_norm": nuclear,
        "sigma_max": float(sigma[0]),
        "sigma_min": float(sigma[-1]),
        "frobenius_norm": frobenius,
        "entry_mean": float(entries.mean()),
        "entry_max": float(entries.max()) if options.extremes else None,
        "entry_min": float(entries.min()) if options.extremes else None,
        "effective_rank": float(np.exp(-np.sum(share * np.log(share)))) if has_rank else None,
        "stable_rank": float((frobenius / sigma[0]) ** 2) if sigma[0] > 0 else None,
        "singular_values": sigma if options.spectrum else None,
    }


def _result(
    example: Example,
    encoding: Encoding,
    status: Literal["ok", "skipped", "non_finite"],
    reason: str | None,
    loss: float | None,
    matrices: dict[str, list],
) -> ExampleResult:
    num_tokens = len(encoding.token_ids)
    return ExampleResult(
        example_index=example.index,
        example_id=example.id,
        num_tokens=num_tokens,
        num_prompt_tokens=encoding.num_prompt_tokens,
        num_response_tokens=num_tokens - encoding.num_prompt_tokens,
        truncated=encoding.truncated,
        loss=loss,
        status=status,
        reason=reason,
        instruction=example.instruction,
        response=example.response,
        matrices=matrices,
    )
