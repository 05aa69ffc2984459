#!/usr/bin/env python
"""Gives every reader of untrusted files N mutated files; each must end in a clear error or a right result.

    python tests/fuzz/run_mutated.py [--count=10000] [--seconds=3600] [--seed=0] [--readers=gguf,parquet]
        [--keep=DIR]

A reader runs in its own process. If a file kills it (an abort, a loop in C, no memory), that file is a find
and a new process goes on with the next one. A file is identified by seed and number. Prints a table; exits
with 1 if there is a find. The files of finds are kept in --keep.
"""

import argparse
import os
import random
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0  # wall-clock seconds without a word from the process


def file_number(reader: object, seed: int, number: int) -> bytes:
    """The mutated file with this number."""
    name, mutated = reader.name, reader.mutated
    return mutated(random.Random(f"{seed} {name} {number}"))


def work(name: str, current: Path, seed: int, start: int, count: int) -> None:
    """The reader's process: prints a line before and after each file, and keeps the file in `current`."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import limits
    from readers import READERS

    reader = READERS[name]
    for valid in reader.valid:
        assert reader.one_input(valid), "a seed is refused"
    for number in range(start, count):
        data = file_number(reader, seed, number)
        current.write_bytes(data)
        print("begin", number, flush=True)
        try:
            with limits.limited():
                outcome = "right" if reader.one_input(data) else "error"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            shown = ascii(f"{type(error).__name__}: {error}")[1:250]
            outcome = f"find {shown} ({Path(where.filename).name}:{where.lineno})"
        print("end", outcome, flush=True)


def drive(name: str, options: argparse.Namespace) -> tuple[Counter[str], list[str]]:
    """Runs a reader's files; returns the counts of each outcome, and a line for each find."""
    seed, count, keep = options.seed, options.count, options.keep
    end = time.monotonic() + options.seconds
    counts: Counter[str] = Counter()
    finds: list[str] = []
    number = 0
    current = keep / f"{name}-{seed}-current"
    while number < count:
        numbers = map(str, (seed, number, count))
        command = [sys.executable, __file__, "--worker", name, str(current), *numbers]
        environment = os.environ | {"MALLOC_ARENA_MAX": "2", "JAX_PLATFORMS": "cpu"}
        with (
            open(keep / f"{name}.stderr", "ab") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            ) as process,
        ):
            begun = None
            while True:
                ready, _, _ = select.select([process.stdout], [], [], PATIENCE if begun else 300)
                line = process.stdout.readline() if ready else ""
                if not line:
                    process.kill()
                    break
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "begin":
                    begun = number = int(rest)
                elif word == "end":
                    kind = rest.split(" ")[0]
                    counts[kind] += 1
                    if kind == "find":
                        finds.append(f"{name} {number}: {rest[5:]}")
                        shutil.copy(current, keep / f"{name}-{seed}-{number}")
                    begun, number = None, number + 1
                    if time.monotonic() > end:
                        process.kill()
                        process.wait()
                        return counts, finds
            code = process.wait()
        if number < count:
            if begun is None:
                raise SystemExit(f"{name}: the process ended with {code}; see {log.name}")
            counts["find"] += 1
            finds.append(f"{name} {number}: the process ended with {code} (-9: it took too long)")
            shutil.copy(current, keep / f"{name}-{seed}-{number}")
            number += 1
    return counts, finds


def main() -> None:
    """Parses the flags and prints the table."""
    if sys.argv[1:2] == ["--worker"]:
        name, current, *numbers = sys.argv[2:]
        work(name, Path(current), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="at most, for each reader")
    parser.add_argument("--readers", help="names, separated by commas; all without it")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-finds"), help="directory for finds")
    options = parser.parse_args()
    if options.readers is None:
        sys.path[:0] = [str(HERE), str(HERE.parent)]
        from readers import READERS

        options.readers = ",".join(READERS)
    options.keep.mkdir(parents=True, exist_ok=True)
    found = []
    print(f"{'reader':<20}{'files':>8}{'errors':>8}{'right':>8}{'finds':>8}{'seconds':>9}")
    for name in options.readers.split(","):
        began = time.monotonic()
        counts, finds = drive(name, options)
        seconds = time.monotonic() - began
        print(
            f"{name:<20}{counts.total():>8}{counts['error']:>8}{counts['right']:>8}"
            f"{counts['find']:>8}{seconds:>9.0f}",
            flush=True,
        )
        for line in finds:
            print(f"  {line}", flush=True)
        found += finds
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
