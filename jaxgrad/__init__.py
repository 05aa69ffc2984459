"""jaxgrad: what a training example does to a language model, by the spectra of its gradients.

The stages, in the order in which data flows through them (docs/decisions.md has the order of imports):

    data -> models, checkpoints -> gradients -> spectra -> measure -> runs -> results
    `pipeline` wires them; `analysis` and `report` turn results into curves, tables and a page.

One dimension key, used as suffixes everywhere (`factor_BTO`):

    B examples        D model width      V vocabulary            L layers
    T tokens          F mlp width        I, O a weight's in, out
    S response        N query heads      R singular values
      positions       K kv heads, G query heads a kv head, H head size
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgrad.analysis import mean_curves, summary_table
    from jaxgrad.checkpoints import load_model
    from jaxgrad.data.examples import Example
    from jaxgrad.data.read import read_examples
    from jaxgrad.errors import UserError
    from jaxgrad.options import AnalyzeOptions
    from jaxgrad.pipeline import analyze, run_analysis
    from jaxgrad.results import read_results
    from jaxgrad.runs.dry_run import dry_run

# Resolved at first use, so that reading results or a --help does not wait for JAX.
_HOME = {
    "AnalyzeOptions": "jaxgrad.options",
    "Example": "jaxgrad.data.examples",
    "UserError": "jaxgrad.errors",
    "analyze": "jaxgrad.pipeline",
    "dry_run": "jaxgrad.runs.dry_run",
    "load_model": "jaxgrad.checkpoints",
    "mean_curves": "jaxgrad.analysis",
    "read_examples": "jaxgrad.data.read",
    "read_results": "jaxgrad.results",
    "run_analysis": "jaxgrad.pipeline",
    "summary_table": "jaxgrad.analysis",
}

__all__ = [
    "AnalyzeOptions",
    "Example",
    "UserError",
    "analyze",
    "dry_run",
    "load_model",
    "mean_curves",
    "read_examples",
    "read_results",
    "run_analysis",
    "summary_table",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
