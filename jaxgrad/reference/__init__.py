"""The same measurement in PyTorch and transformers, for comparison only; imported by nothing else.

`torch_procedure` is the authors' procedure as they run it, one example and one full SVD at a time,
in code that shares nothing with ours but the records, the tokenizer and the results' columns.
`compare` holds two sets of results against each other. Both need `pip install '.[reference]'`.
"""

from jaxgrad.reference.compare import (
    Comparison,
    Difference,
    compare_results,
    compare_with_torch,
    default_tolerances,
)
from jaxgrad.reference.torch_procedure import (
    backward,
    differentiate_by,
    encode_example,
    load_torch_model,
    measure_in_torch,
)

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
