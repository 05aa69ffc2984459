"""Compares two sets of results, statistic by statistic.

| statistic | difference is relative to |
|---|---|
| loss, nuclear_norm, sigma_max, frobenius_norm, effective_rank | the reference's value |
| entry_max, entry_min (if measured) | the reference's value |
| entry_mean | frobenius_norm / sqrt(rows * cols), the root mean square of the entries |

The entries have both signs, so their mean may be close to zero. Its error is measured by the size of the
entries instead. `sigma_min`, `rank_bound` and `condition_number` are not compared: below full rank they
depend on the rounding noise of a full SVD.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.data.examples import Example
from jaxgrad.data.tokens import TokenizedExample, tokenize_all
from jaxgrad.options import AnalyzeOptions, ModelOptions
from jaxgrad.pipeline import analyze
from jaxgrad.projections import HEAD
from jaxgrad.reference.encoding import Encoding, encode_example
from jaxgrad.reference.tokenizer import reference_tokenizer
from jaxgrad.reference.torch_model import load_torch_model
from jaxgrad.reference.torch_procedure import measure_in_torch
from jaxgrad.reference.weights import llama_name
from jaxgrad.results import ExampleResult, columns

_EXTREMES = tuple(column.name for column in columns.EXTREMES)
STATISTICS = (
    "nuclear_norm",
    "sigma_max",
    "frobenius_norm",
    "effective_rank",
    "entry_mean",
    *_EXTREMES,
)


@dataclass(frozen=True)
class Difference:
    """How far two sets of results differ in one statistic.

    Attributes:
        statistic: a column's name.
        count: how many values were compared.
        largest: the largest relative difference; infinite if a value is undefined on one side only.
        median: the median of the relative differences.
        example_index: the example with the largest difference.
        weight: the weight with the largest difference; None for the loss.
    """

    statistic: str
    count: int
    largest: float
    median: float
    example_index: int
    weight: str | None

    @property
    def where(self) -> str:
        """Where the largest difference is, in words."""
        example = f"example {self.example_index}"
        return example if self.weight is None else f"{example}, {self.weight}"


@dataclass(frozen=True)
class Comparison:
    """How far two sets of results differ, by statistic."""

    differences: tuple[Difference, ...]

    def __getitem__(self, statistic: str) -> Difference:
        return next(d for d in self.differences if d.statistic == statistic)

    def beyond(self, tolerances: Mapping[str, float]) -> list[Difference]:
        """The statistics whose largest difference exceeds their tolerance."""
        # `not <=` instead of `>`: a NaN exceeds every tolerance.
        return [d for d in self.differences if not d.largest <= tolerances[d.statistic]]

    def table(self, tolerances: Mapping[str, float] | None = None) -> str:
        """The differences as aligned text, with the tolerances if they are given."""
        head = ["statistic", "values", "largest", "median", "tolerance", "largest at"]
        body = []
        for d in self.differences:
            allowed = "" if tolerances is None else f"{tolerances[d.statistic]:.0e}"
            numbers = [f"{d.largest:.1e}", f"{d.median:.1e}"]
            body.append([d.statistic, str(d.count), *numbers, allowed, d.where])
        widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *body)
        )


def default_tolerances(dtype: str, tolerance: float | None = None) -> dict[str, float]:
    """Statistic -> the relative difference that two correct programs may have.

    | dtype | default tolerance | exceptions |
    |---|---|---|
    | float32 | 1e-4 | the loss a tenth of it; the effective rank five times, see below |
    | float64 | 1e-8 | none |

    Singular values that should be zero are rounding noise in PyTorch. Its effective rank counts them.

    Args:
        dtype: "float32" or "float64".
        tolerance: in place of the default.
    """
    if dtype == "float64":
        return dict.fromkeys(("loss", *STATISTICS), 1e-8 if tolerance is None else tolerance)
    base = 1e-4 if tolerance is None else tolerance
    return dict.fromkeys(STATISTICS, base) | {"loss": base / 10, "effective_rank": 5 * base}


def compare_with_torch(
    model_path: str | None,
    examples: Sequence[Example],
    options: AnalyzeOptions,
    *,
    model_options: ModelOptions = ModelOptions(),
    wide_loss: bool = True,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Comparison:
    """Measure examples with jaxgrad and with the authors' procedure, and compare.

    Args:
        model_path: as `load_model` takes it.
        examples: from `read_examples`.
        options: of both sides. Both compute in `options.dtype`.
        model_options: an adapter's base, and a hub id's revision.
        wide_loss: take PyTorch's cross entropy in float64 (see `torch_procedure`).
        say: takes the lines for the user.
        progress: show a bar on stderr.

    Raises:
        UserError: any bad input, in one line.
        ValueError: the two sides give an example different tokens.
    """
    checkpoint = open_checkpoint(model_path, model_options)
    for note in checkpoint.notes:
        say(note)
    ours_model = checkpoint.load(options.dtype)
    options = options.fitted_to(ours_model.config.max_positions)
    tokenizer = ours_model.tokenizer
    tokenized = tokenize_all(examples, tokenizer, options.protocol_for(tokenizer))
    say(
        f"{ours_model.name}, {options.dtype}, method {options.method}: "
        f"{sum(item.measurable for item in tokenized)} of {len(tokenized)} examples, "
        f"{', '.join(str(item.num_tokens) for item in tokenized)} tokens"
    )
    reference_s_own, which = reference_tokenizer(checkpoint.tokenizer_place, tokenizer)
    say(which)
    for item in tokenized:
        check_tokens(item, encode_example(item.example, reference_s_own, options))

    def collect(rows: Iterator[ExampleResult], label: str) -> list[ExampleResult]:
        total = len(examples)
        return list(tqdm(rows, label, total=total, disable=not progress, unit="example"))

    ours = collect(analyze(ours_model, examples, options), "jaxgrad")
    model = load_torch_model(model_path, dtype=options.dtype, options=model_options)
    rows = measure_in_torch(model, reference_s_own, examples, options, wide_loss=wide_loss)
    reference = collect(rows, "PyTorch")
    return compare_results(ours, reference)


def check_tokens(ours: TokenizedExample, reference: Encoding) -> None:
    """Raises unless both sides measure the same tokens.

    Raises:
        ValueError: they do not. The message names the example and the token.
    """
    example = f"example {ours.example.index}"
    pairs = zip(ours.token_ids.tolist(), reference.token_ids, strict=False)
    for position, (token, expected) in enumerate(pairs):
        if token != expected:
            raise ValueError(f"{example}: token {position} is {token}, in the reference {expected}")
    targets = ours.targets.tolist()
    mine = (ours.num_tokens, ours.num_prompt_tokens, targets, ours.truncated, ours.reason)
    ids = reference.token_ids
    theirs = (len(ids), reference.num_prompt_tokens, *reference[1:])
    counts = ("number of tokens", "number of prompt tokens")
    names = (*counts, "list of target positions", "truncated", "reason for skipping")
    for name, value, wanted in zip(names, mine, theirs, strict=True):
        if value != wanted:
            raise ValueError(f"{example}: {name} is {value}, in the reference {wanted}")


def compare_results(
    results: Sequence[ExampleResult], reference: Sequence[ExampleResult]
) -> Comparison:
    """The relative differences over all examples and matrices.

    Args:
        results: one for each example, in any order.
        reference: of the same examples. Differences are relative to its values.

    Raises:
        ValueError: nothing was measured, or the two sides hold different examples or matrices.
    """
    mine = {row.example_index: row for row in results}
    theirs = {row.example_index: row for row in reference}
    if mine.keys() != theirs.keys():
        raise ValueError(f"examples {sorted(mine)}, in the reference {sorted(theirs)}")
    found: dict[str, list[tuple[float, int, str | None]]] = {}
    for index in sorted(mine):
        for statistic, weight, difference in _differences(mine[index], theirs[index]):
            found.setdefault(statistic, []).append((difference, index, weight))
    if not found:
        raise ValueError("none of the examples was measured")
    differences = []
    for statistic, triples in found.items():
        values = [difference for difference, _, _ in triples]
        largest, example, weight = triples[int(np.argmax(values))]
        median = float(np.median(values))
        differences.append(Difference(statistic, len(values), largest, median, example, weight))
    return Comparison(tuple(differences))


def _differences(
    mine: ExampleResult, theirs: ExampleResult
) -> Iterator[tuple[str, str | None, float]]:
    if mine.status == theirs.status == "skipped":
        return
    yield "loss", None, _relative(mine.loss, theirs.loss, theirs.loss)
    if not (mine.matrices and theirs.matrices):
        return  # not measured or not finite. If that is so on one side only, the loss shows it.
    names = [_weight_names(row.matrices) for row in (mine, theirs)]
    if names[0] != names[1]:
        raise ValueError(f"example {mine.example_index}: the two sides hold different matrices")
    expected_columns = theirs.matrices
    absent = [None] * len(names[1])  # a column that is not there is null
    for statistic in STATISTICS:
        values, expected_values = (row.matrices.get(statistic, absent) for row in (mine, theirs))
        rows = zip(values, expected_values, names[1], strict=True)
        for position, (value, expected, weight) in enumerate(rows):
            if _undefined(value) and _undefined(expected) and statistic in _EXTREMES:
                continue  # not measured
            unit = expected
            if statistic == "entry_mean":
                size = expected_columns["rows"][position] * expected_columns["cols"][position]
                unit = expected_columns["frobenius_norm"][position] / math.sqrt(size)
            yield statistic, weight, _relative(value, expected, unit)


def _weight_names(matrices: Mapping[str, Any]) -> list[str]:
    return [
        llama_name(projection, None if projection == HEAD else int(layer))
        for projection, layer in zip(matrices["projection"], matrices["layer"], strict=True)
    ]


def _undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _relative(value: float | None, expected: float | None, unit: float | None) -> float:
    if _undefined(value) and _undefined(expected):
        return 0.0
    if value is None or expected is None or unit is None or not math.isfinite(value - expected):
        return math.inf
    if value == expected:
        return 0.0
    return abs(value - expected) / abs(unit) if unit else math.inf
