"""Analysis: what a run's tables say, and how far they may be believed. NumPy, SciPy, pandas; no JAX.

    Results -> example_set -> ExampleSet -> .values(statistic) -> describe -> curve, MAD, segments
               two of them -> contrast -> RD, sign-flip p, AUC, counts; and the controls of `controls`

`statistics` declares what can be analysed, `addresses` orders the matrices of a layer. `curves` computes
MAD and RD from mean curves. `resampling` draws examples, `intervals` turns the draws into limits. `pairing`
says which sets and examples belong together, `separation` has p and AUC. `similarity` averages cosines.
`summary` is the short table of `bin/summarize`.

This stage adds to the package's dimension key, and uses R for something else:

    E examples of a set     P matrices of a layer ("q", "up.3")     R bootstrap resamples
"""

from jaxgrad.analysis.contrasts import Contrast, Description, contrast, describe
from jaxgrad.analysis.controls import (
    Leakage,
    LengthMatch,
    LengthRegression,
    leakage_contrast,
    length_regression,
    match_response_tokens,
    matched_contrast,
    sum_loss_contrast,
)
from jaxgrad.analysis.curves import mean_absolute_difference, segments
from jaxgrad.analysis.example_set import ExampleSet, Values, example_set
from jaxgrad.analysis.intervals import Interval, bootstrap
from jaxgrad.analysis.pairing import check_comparable, pair_by_instruction
from jaxgrad.analysis.resampling import Resampling
from jaxgrad.analysis.separation import chance_smaller, sign_flip_test
from jaxgrad.analysis.similarity import Similarity, mean_similarity
from jaxgrad.analysis.statistics import (
    DEFAULT_STATISTICS,
    STATISTICS,
    Statistic,
    find_statistic,
)
from jaxgrad.analysis.summary import mean_curves, summary_table

__all__ = [
    "DEFAULT_STATISTICS",
    "STATISTICS",
    "Contrast",
    "Description",
    "ExampleSet",
    "Interval",
    "Leakage",
    "LengthMatch",
    "LengthRegression",
    "Resampling",
    "Similarity",
    "Statistic",
    "Values",
    "bootstrap",
    "chance_smaller",
    "check_comparable",
    "contrast",
    "describe",
    "example_set",
    "find_statistic",
    "leakage_contrast",
    "length_regression",
    "match_response_tokens",
    "matched_contrast",
    "mean_absolute_difference",
    "mean_curves",
    "mean_similarity",
    "pair_by_instruction",
    "segments",
    "sign_flip_test",
    "sum_loss_contrast",
    "summary_table",
]
