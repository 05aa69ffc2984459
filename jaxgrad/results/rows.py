"""Measured arrays of a batch -> one `ExampleResult` an example."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrad.device_sizes import projection_sizes
from jaxgrad.gradients import Selection, parameter_names
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.results.schema import ExampleResult
from jaxgrad.spectra import Statistics
from jaxgrad.tokens import TokenizedExample

LISTS = ("singular_values", "layer_cosines")
FLAGS = ("input_finite", "output_grad_finite")  # read here, no columns
SCALARS = tuple(name for name in Statistics._fields if name not in (*LISTS, *FLAGS))


def skipped_result(item: TokenizedExample) -> ExampleResult:
    """The row of an example that cannot be measured, with its reason."""
    return _result(item, None, "skipped", item.reason, {})


def example_results(
    members: Sequence[TokenizedExample],
    loss_B: np.ndarray,
    statistics: dict[str, Statistics],
    selection: Selection,
    config: DecoderConfig,
) -> list[ExampleResult]:
    """Rows of the real examples of a batch, matrices in the order of layers, `lm_head` last.

    An example whose loss or gradient is not finite keeps its row, with the place where that first
    appeared (`_first_not_finite`), and has no matrices: numbers that are not numbers must not enter
    anybody's mean.

    Args:
        members: the examples in the batch's first rows.
        loss_B: [B], B >= len(members).
        statistics: projection -> arrays [B, L, ...].
        selection: which layers the L are.
        config: the model, for the sizes of its matrices.
    """
    sizes = projection_sizes(config)
    # (sort key, projection, its position along L); sorted, they are in the order of the forward pass.
    places = [
        (name == "lm_head", layer, order, name, position)
        for order, (name, layers) in enumerate(selection.layers)
        for position, layer in enumerate(layers)
    ]
    places.sort()
    is_head = np.array([place[0] for place in places])
    layers = np.array([place[1] for place in places], np.float64)
    layers[is_head] = np.nan
    projections = [place[3] for place in places]
    names = {place: name for name, place in parameter_names(config).items()}
    weights = [names[name, layer] for _, layer, _, name, _ in places]
    steps = [(layer, PROJECTIONS[name].input) for _, layer, _, name, _ in places]
    partly = ", first among the measured weights" if len(places) < len(names) else ""
    rows = []
    for b, item in enumerate(members):
        values = {
            field: np.array([getattr(statistics[p[3]], field)[b, p[4]] for p in places])
            for field in (*SCALARS, *FLAGS)
        }
        finite = {
            "input": values.pop("input_finite"),
            "output_grad": values.pop("output_grad_finite"),
            "statistics": np.isfinite(values["nuclear_norm"]),
        }
        reason = _first_not_finite(float(loss_B[b]), finite, weights, steps)
        if reason is not None:
            rows.append(_result(item, None, "non_finite", reason + partly, {}))
            continue
        columns: dict[str, np.ndarray | list] = dict(values)
        columns |= {
            "layer": layers,
            "projection": projections,
            "rows": np.array([sizes[name][0] for name in projections], np.int32),
            "cols": np.array([sizes[name][1] for name in projections], np.int32),
        }
        spectra = [statistics[p[3]].singular_values[b, p[4]] for p in places]
        if spectra[0].size:
            # Zero beyond the rank bound: what padding added to the length says nothing.
            bounds = columns["rank_bound"]
            columns["singular_values"] = [
                values[:bound] for values, bound in zip(spectra, bounds, strict=True)
            ]
        cosines = [statistics[p[3]].layer_cosines[b, p[4]] for p in places]
        if cosines[0].size:
            columns["layer_cosines"] = cosines
        rows.append(_result(item, float(loss_B[b]), "ok", None, columns))
    return rows


def _first_not_finite(
    loss: float, finite: dict[str, np.ndarray], weights: Sequence[str], steps: Sequence[Any]
) -> str | None:
    """Where the numbers of an example first ceased to be finite; None where all are.

    One NaN makes everything behind it NaN, so of the places that show it the first in the order of
    computation is the one to look at: the inputs X from layer 0 up, the loss, then the gradients D by
    the outputs from the last layer down; at last what is made of finite factors, which can overflow.

    The text has no number of the example's own, so that equal cases are counted together.

    Args:
        loss: of the example.
        finite: whether "input", "output_grad" and "statistics" of each matrix are, bool [P].
        weights: the P names, in the order of the forward pass.
        steps: equal for weights with one input, whose gradients do not come one after the other.
    """
    if np.isfinite(loss) and all(flags.all() for flags in finite.values()):
        return None
    told = "loss is finite" if np.isfinite(loss) else f"loss is {loss}"
    bad = {name: np.flatnonzero(~flags).tolist() for name, flags in finite.items()}
    if bad["input"]:
        where = f"in the forward pass at the input of {weights[bad['input'][0]]}"
    elif not np.isfinite(loss):
        where = f"in the forward pass between the input of {weights[-1]} and the loss"
    elif bad["output_grad"]:
        last = steps[bad["output_grad"][-1]]
        first = next(p for p in bad["output_grad"] if steps[p] == last)
        where = f"in the backward pass at the output of {weights[first]}"
    else:
        overflown = weights[bad["statistics"][0]]
        where = f"in the statistics, which overflow, of the finite factors of {overflown}"
    return f"{told}; first not finite {where}"


def _result(
    item: TokenizedExample,
    loss: float | None,
    status: str,
    reason: str | None,
    matrices: dict[str, np.ndarray | list],
) -> ExampleResult:
    return ExampleResult(
        example_index=item.example.index,
        example_id=item.example.id,
        num_tokens=item.num_tokens,
        num_prompt_tokens=item.num_prompt_tokens,
        num_response_tokens=item.num_response_tokens,
        truncated=item.truncated,
        loss=loss,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        instruction=item.example.instruction,
        response=item.example.response,
        matrices=matrices,
    )
