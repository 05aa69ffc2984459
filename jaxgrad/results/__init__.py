"""Results: what a run measured. It is written while the run goes on, and read back as tables.

| module | what it does |
|---|---|
| `columns` | declares every column |
| `schema` | makes the two tables, and their bytes |
| `layout` | the files of a run directory, and how damage is found |
| `store` | writes and continues a run |
| `read` | reads a run into pandas |
| `storage` | a run directory on a local disk (`files`) or in an object store (with a `lease`) |
| `urls` | tells paths from URLs |
| `authors`, `authors_cosines` | the authors' JSONL, written and read |
| `losses` | which loss a run is of |
| `provenance` | what wrote a result |
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
