"""A run of two windows, driven as the analyze command drives one, on any storage."""

import subprocess
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxgrad.results import ExampleResult, RunDirectory

IDENTITY = {"model": {"hash": "ab12", "dtype": "float32"}, "window": 7, "protocol": "paper"}
INFO = {"version": "0.1.0", "device": "cpu"}
# Two windows of examples; inside, batches by length, so their order is not that of the examples.
PLAN = {0: [[5, 0, 3], [1, 6], [4]], 1: [[11, 8], [7, 10, 9]]}
SKIPPED = {0: [2], 1: [12]}
COUNTS = {"measured": 11, "skipped": 2}


class Killed(BaseException):
    """The end of the process: nothing that handles errors may run for it."""


def measured(index: int) -> ExampleResult:
    spectrum = np.sort(np.random.default_rng(index).random(3))[::-1]
    # Rows in no sorted order: the store must keep the order they come in.
    return ExampleResult(
        index, f"id-{index}", 17, 5, 12, index % 2 == 0, 1.5 + index, "ok", None, "q é", "r",
        {
            "layer": np.array([1, 0, np.nan]), "projection": ["q", "o", "lm_head"],
            "rows": np.array([5, 5, 11]), "cols": np.array([3, 3, 3]), "rank_bound": [3, 3, 2],
            "nuclear_norm": np.full(3, spectrum.sum(), np.float32),
            "effective_rank": np.array([2.5, np.nan, 1.0]),
            "entry_mean": np.array([np.nan, 0.5, 0.25]),
            "singular_values": [spectrum, spectrum, spectrum[:2]],
        },
    )  # fmt: skip


def skipped(index: int) -> ExampleResult:
    return ExampleResult(
        index, f"id-{index}", 1024, 1024, 0, True, None, "skipped", "no response token", "q", "r"
    )


def complete(path: str | Path, computed: list[int] | None = None) -> None:
    """What the analyze command does: the plan's batches that are not done, then the marks."""
    with RunDirectory.open(path, IDENTITY, INFO) as run:
        if run.finished:
            return
        for window, batches in PLAN.items():
            if run.window_done(window):
                continue
            for number, batch in enumerate(batches):
                if (window, number) not in run.journaled_batches():
                    run.write_batch(window, number, [measured(index) for index in batch])
                    if computed is not None:
                        computed.extend(batch)
            rows = [skipped(index) for index in SKIPPED[window]]
            run.finish_window(window, rows, num_examples=7 - window)
        run.finish(COUNTS)


def parts(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "run.json"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def stored(url: str) -> dict[str, bytes]:
    """As `parts`, of a memory:// URL."""
    files, root = fsspec.core.url_to_fs(url)
    names = [name.removeprefix(f"{root}/") for name in files.find(root)]
    return {name: files.cat_file(f"{root}/{name}") for name in names if name != "run.json"}


@contextmanager
def small_disk(path: Path, size: str):
    """A file system of its own, as large as `size`; yields a function that makes it another size."""
    path.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(path)], check=True)
