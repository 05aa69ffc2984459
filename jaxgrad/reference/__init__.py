"""The same measurement in PyTorch and transformers, for comparison only. No other folder imports it.

`torch_procedure` is the authors' procedure: one example and one full SVD at a time. It shares with jaxgrad
only the records, the tokenizer, the names of projections and the columns of results. `compare` compares two
sets of results. Needs `pip install '.[reference]'`.
"""

from jaxgrad.reference.compare import (
    Comparison,
    Difference,
    compare_results,
    compare_with_torch,
    default_tolerances,
)
from jaxgrad.reference.encoding import encode_example
from jaxgrad.reference.torch_model import load_torch_model
from jaxgrad.reference.torch_procedure import backward, differentiate_by, measure_in_torch

__all__ = [
    "Comparison",
    "Difference",
    "backward",
    "compare_results",
    "compare_with_torch",
    "default_tolerances",
    "differentiate_by",
    "encode_example",
    "load_torch_model",
    "measure_in_torch",
]
