#!/usr/bin/env python
"""Coverage-guided fuzzing of one reader with atheris (pip install 'jaxgrad[fuzz]'), to a find or a limit.

    python tests/fuzz/run_atheris.py READER [--runs=10000] [--seconds=300] [--corpus=DIR]

The Python code of jaxgrad and of the libraries that parse in Python is instrumented. The corpus starts with
the reader's valid files. Half of the inputs are mutated by `mutations.py`, the others by libFuzzer. A find
ends the run and is written to ./crash-*; exit code 0 means that there was none.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
INSTRUMENTED = ["jaxgrad", "gguf", "jinja2", "tomllib", "json"]


def main() -> None:
    """Parses the flags and fuzzes."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with atheris.instrument_imports(include=INSTRUMENTED):
        import limits
        from readers import READERS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reader", choices=sorted(READERS), metavar="READER", help=f"one of {', '.join(READERS)}"
    )
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, help="kept between runs; a temporary one without it")
    options = parser.parse_args()
    reader = READERS[options.reader]
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, valid in enumerate(reader.valid):
        assert reader.one_input(valid), "a seed is refused"
        (corpus / f"seed-{number}").write_bytes(valid)
    outcomes = {True: 0, False: 0}

    def one_input(data: bytes) -> None:
        with limits.limited():
            outcomes[reader.one_input(data)] += 1

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        return reader.mutated(rng)[:most]

    largest = max(map(len, reader.valid)) + 100_000
    flags = [f"-runs={options.runs}", f"-max_total_time={options.seconds}", f"-max_len={largest}"]
    # `limits` limits memory: libFuzzer's limit would count the program itself.
    flags += ["-rss_limit_mb=0", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
