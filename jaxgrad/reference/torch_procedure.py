"""The authors' procedure in PyTorch: one example at a time, each weight's gradient, its full SVD.

Written from the paper's protocol, not from our stages, so that an error there is not repeated here. The
model is transformers' own (`torch_model`), labels mask the prompt, and autograd gives the weights' own
gradients.

Two things differ from the authors' code:

- The cross entropy is taken in float64. PyTorch's float32 kernel on the CPU sums exp(logit) over the
  vocabulary with a bias. At 49152 tokens it lowers the loss by 5e-6 of its value and moves a sigma_1 by up
  to 2e-4, ten times more than all other rounding (SmolLM2-135M, AQuA, against the model in float64). It
  would hide errors of ours. `wide_loss=False` takes it as the authors had it.
- Only singular values are computed. The authors' call also takes both full sets of singular vectors and
  drops them; `decomposition="svd"` does the same.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from jaxgrad.data.examples import Example
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.encoding import Encoding, encode_example
from jaxgrad.reference.losses import IGNORED_LABEL, torch_loss
from jaxgrad.reference.torch_model import float32_means_float64, torch
from jaxgrad.reference.weights import Weight, select_weights
from jaxgrad.results import ExampleResult

Decomposition = Literal["svdvals", "svd"]

UNDEFINED_BELOW = 1e-12  # with a nuclear norm below this there is no effective rank


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
        tokenizer: from `reference_tokenizer`, or a `transformers` tokenizer.
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
    options = options.fitted_to(model.config.get_text_config().max_position_embeddings)
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
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    labels[:, encoding.targets] = input_ids[:, encoding.targets]
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
        num_response_tokens=len(encoding.targets),
        truncated=encoding.truncated,
        loss=loss,
        status=status,
        reason=reason,
        instruction=example.instruction,
        response=example.reply_text,
        matrices=matrices,
    )
