"""Measured arrays of a batch -> one `ExampleResult` an example."""

from collections.abc import Sequence

import numpy as np

from jaxgrad.gradients import Selection, parameter_names
from jaxgrad.models.config import DecoderConfig
from jaxgrad.results.schema import ExampleResult
from jaxgrad.spectra import Statistics
from jaxgrad.tokens import TokenizedExample

LISTS = ("singular_values", "layer_cosines")
SCALARS = tuple(name for name in Statistics._fields if name not in LISTS)


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

    An example whose loss or gradient is not finite keeps its row, with the place where that shows
    first, and has no matrices: numbers that are not numbers must not enter anybody's mean.

    Args:
        members: the examples in the batch's first rows.
        loss_B: [B], B >= len(members).
        statistics: projection -> arrays [B, L, ...].
        selection: which layers the L are.
        config: the model, for the sizes of its matrices.
    """
    sizes = _matrix_sizes(config)
    names = {place: name for name, place in parameter_names(config).items()}
    # (sort key, projection, layer, its position along L)
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
    rows = []
    for b, item in enumerate(members):
        columns: dict[str, np.ndarray | list] = {
            field: np.array([getattr(statistics[p[3]], field)[b, p[4]] for p in places])
            for field in SCALARS
        }
        bad = np.flatnonzero(~np.isfinite(columns["nuclear_norm"]))
        if not np.isfinite(loss_B[b]) or len(bad):
            reason = f"loss is {loss_B[b]}"
            if len(bad):
                first = names[projections[bad[0]], places[bad[0]][1]]
                reason += f"; gradient not finite in {len(bad)} matrices, first {first}"
            rows.append(_result(item, None, "non_finite", reason, {}))
            continue
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


def _matrix_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Projection -> (outputs, inputs)."""
    attention = config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    return {
        "q": (attention, config.width),
        "k": (kv, config.width),
        "v": (kv, config.width),
        "o": (config.width, attention),
        "gate": (config.mlp_width, config.width),
        "up": (config.mlp_width, config.width),
        "down": (config.width, config.mlp_width),
        "lm_head": (config.vocab_size, config.width),
    }


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
