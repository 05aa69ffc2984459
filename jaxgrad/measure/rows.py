"""Measured arrays of a batch -> one `ExampleResult` an example."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrad.data.tokens import TokenizedExample
from jaxgrad.gradients.selection import Selection, parameter_names
from jaxgrad.measure.reducers import REDUCERS
from jaxgrad.measure.reduction import Measured
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import PROJECTIONS
from jaxgrad.models.device_sizes import projection_sizes
from jaxgrad.projections import MatrixAddress
from jaxgrad.results.schema import ExampleResult
from jaxgrad.spectra import FINITE_FLAGS

_DECLARED = {column.name: column for reducer in REDUCERS for column in reducer.columns}


def skipped_result(item: TokenizedExample) -> ExampleResult:
    """The row of an example that cannot be measured, with its reason."""
    return _result(item, None, "skipped", item.reason, {})


def example_results(
    members: Sequence[TokenizedExample],
    loss_B: np.ndarray,
    measured: Measured,
    selection: Selection,
    config: DecoderConfig,
) -> list[ExampleResult]:
    """Rows of the real examples of a batch, matrices in the order of their addresses.

    An example whose loss or gradient is not finite keeps its row, with the place where that first
    appeared (`_first_not_finite`), and has no matrices: numbers that are not numbers must not enter
    anybody's mean.

    Args:
        members: the examples in the batch's first rows.
        loss_B: [B], B >= len(members).
        measured: projection -> column -> array [B, L, ...].
        selection: which matrices the L are.
        config: the model, for the sizes of its matrices.
    """
    matrices = _matrices_in_order(selection)
    addresses = [address for address, _ in matrices]
    columns = _address_columns(addresses, config)
    names = {address: name for name, address in parameter_names(config).items()}
    weights = [names[address] for address in addresses]
    steps = [(address.layer, PROJECTIONS[address.projection].input) for address in addresses]
    partly = ", first among the measured weights" if len(weights) < len(names) else ""
    rows = []
    for b, item in enumerate(members):
        values = {
            name: [measured[address.projection][name][b, at] for address, at in matrices]
            for name in measured[addresses[0].projection]
        }
        flags = [np.array(values.pop(name)) for name in FINITE_FLAGS]
        finite = {
            "input": flags[0],
            "output_grad": flags[1],
            "statistics": np.isfinite(values["nuclear_norm"]),
        }
        reason = _first_not_finite(float(loss_B[b]), finite, weights, steps)
        if reason is not None:
            rows.append(_result(item, None, "non_finite", reason + partly, {}))
            continue
        rows.append(_result(item, float(loss_B[b]), "ok", None, columns | _value_columns(values)))
    return rows


def _matrices_in_order(selection: Selection) -> list[tuple[MatrixAddress, int]]:
    """Each matrix's address and its position along L, in the order of the forward pass."""
    found = []
    for name in selection.names:
        of_projection = [a for a in selection.addresses if a.projection == name]
        found += [(address, position) for position, address in enumerate(of_projection)]
    return sorted(found, key=lambda pair: pair[0].order)


def _address_columns(
    addresses: Sequence[MatrixAddress], config: DecoderConfig
) -> dict[str, np.ndarray | list]:
    sizes = projection_sizes(config)
    columns: dict[str, np.ndarray | list] = {
        name: [getattr(address, name) for address in addresses] for name in MatrixAddress._fields
    }
    for axis, name in enumerate(("rows", "cols")):
        columns[name] = np.array([sizes[a.projection][axis] for a in addresses], np.int32)
    return columns


def _value_columns(values: dict[str, list]) -> dict[str, np.ndarray | list]:
    """The columns as they are declared: what padding added to a list's length is cut off.

    Raises:
        KeyError: a reducer gave a column that it does not declare.
    """
    columns: dict[str, np.ndarray | list] = {}
    for name, found in values.items():
        column = _DECLARED[name]
        if column.length_column is not None:
            lengths = values[column.length_column]
            found = [row[:length] for row, length in zip(found, lengths, strict=True)]
        columns[name] = found if column.is_list else np.array(found)
    return columns


def _first_not_finite(
    loss: float, finite: dict[str, np.ndarray], weights: Sequence[str], steps: Sequence[Any]
) -> str | None:
    """Where the numbers of an example first ceased to be finite; None where all are.

    One NaN makes everything computed from it NaN. So of all numbers that show it, the one that is computed
    first is the one to look at: the inputs X from layer 0 up, the loss, then the gradients D by
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
        response=item.example.reply_text,
        matrices=matrices,
    )
