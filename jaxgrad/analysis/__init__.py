"""Analysis: what a run's tables say, and how far they may be believed. NumPy, SciPy, pandas; no JAX.

`example_set` makes arrays of a run; `curves` reads statistics off mean curves, `intervals` says how
sure they are, `contrasts` compares two sets, `controls` asks whether length or leakage explains the
difference; `summary` is the short table of `bin/summarize`.

To the package's dimension key come, in this stage alone:

    E examples of a set     P projections     R bootstrap resamples (no singular value is in sight)
"""

from jaxgrad.analysis.curves import mean_absolute_difference
from jaxgrad.analysis.summary import mean_curves, summary_table

__all__ = ["mean_absolute_difference", "mean_curves", "summary_table"]
