"""Tables made straight from a run's tables: mean curves, and norm and MAD of several runs side by side."""

from collections.abc import Mapping

import pandas as pd

from jaxgrad.analysis.addresses import within_layer
from jaxgrad.analysis.curves import mean_absolute_difference
from jaxgrad.errors import UserError


def mean_curves(matrices: pd.DataFrame, statistic: str = "nuclear_norm") -> pd.DataFrame:
    """Mean of a statistic over examples: one row a layer, one column a projection.

    Experts and parts of a weight have columns of their own ("up.3", "q.lora_A").

    Args:
        matrices: the matrices table of `read_results`; unmeasured examples have no rows in it.
        statistic: one of its columns. Undefined values (null) are left out of the mean;
            `example_set(...).values(...)` leaves out the example instead, and counts it.
    """
    layered = matrices[matrices["layer"].notna()]
    layered = layered.assign(projection=within_layer(layered).word_of_each())
    order = list(dict.fromkeys(layered["projection"].dropna()))
    curves = layered.pivot_table(index="layer", columns="projection", values=statistic)
    return curves[order]


def summary_table(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean nuclear norm and MAD for each run and projection.

    Args:
        runs: label -> matrices table.

    Returns:
        One row a label; columns (projection, "nuclear norm" | "MAD").

    Raises:
        UserError: a run without a single measured example.
    """
    rows = {}
    for label, matrices in runs.items():
        if matrices.empty:
            raise UserError(
                f"run {label!r} has no measured example, so there is nothing to average"
            )
        curves = mean_curves(matrices)
        rows[label] = {
            (projection, name): value
            for projection in curves
            for name, value in (
                ("nuclear norm", curves[projection].mean()),
                ("MAD", mean_absolute_difference(curves[projection].to_numpy())),
            )
        }
    return pd.DataFrame.from_dict(rows, orient="index")
