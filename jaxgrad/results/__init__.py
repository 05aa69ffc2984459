"""Results: what a run measured, on disk as it goes, read back as tables, in the authors' form.

`columns` declares the tables, `schema` makes them, `layout` the files of a run directory and how they are known to be whole,
`store` writes and resumes one, `read` reads one, `authors` turns it into the authors' JSONL and back.
`storage` is where the files are, on a local disk (`files`) or in an object store, which needs a `lease`.
"""

from jaxgrad.results.authors import read_authors_jsonl, write_authors_jsonl
from jaxgrad.results.read import Results, iter_results, read_results
from jaxgrad.results.schema import (
    EXAMPLES_SCHEMA,
    MATRICES_SCHEMA,
    ExampleResult,
    examples_table,
    matrices_table,
)
from jaxgrad.results.store import RunDirectory

__all__ = [
    "EXAMPLES_SCHEMA",
    "MATRICES_SCHEMA",
    "ExampleResult",
    "Results",
    "RunDirectory",
    "examples_table",
    "iter_results",
    "matrices_table",
    "read_authors_jsonl",
    "read_results",
    "write_authors_jsonl",
]
