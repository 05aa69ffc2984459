"""Analysis: what a run's tables say, and how far they may be believed. NumPy, SciPy, pandas; no JAX.

    Results -> example_set -> ExampleSet -> .values(statistic) -> describe -> curve, MAD, segments
               two of them -> contrast -> RD, sign-flip p, AUC, counts; and the controls of `controls`

`curves` reads statistics off mean curves; `resampling` draws examples, `intervals` makes limits of the
draws; `pairing` says which sets and examples belong together, `separation` has p and AUC; `similarity`
averages cosines; `summary` is the short table of `bin/summarize`.

To the package's dimension key come, in this stage alone:

    E examples of a set     P projections     R bootstrap resamples (no singular value is in sight)
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
from jaxgrad.analysis.example_set import STATISTICS, ExampleSet, Values, example_set
from jaxgrad.analysis.intervals import Interval, bootstrap
from jaxgrad.analysis.pairing import check_comparable, pair_by_instruction
from jaxgrad.analysis.resampling import Resampling
from jaxgrad.analysis.separation import chance_smaller, sign_flip_test
from jaxgrad.analysis.similarity import Similarity, mean_similarity
from jaxgrad.analysis.summary import mean_curves, summary_table

__all__ = [
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
    "Values",
    "bootstrap",
    "chance_smaller",
    "check_comparable",
    "contrast",
    "describe",
    "example_set",
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
