"""What the benchmarks share: flags, interleaved timing, tables, and the line of JSON that ends each."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT / "bin"))
# A GPU is shared with PyTorch. From the cache a program would take no time to compile.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
from _environment import use_project_environment  # noqa: E402

use_project_environment()
from absl import flags  # noqa: E402

from jaxgrad.command_line import FlagGroup  # noqa: E402
from jaxgrad.commands.huge_pages import restart_with_huge_pages  # noqa: E402
from jaxgrad.errors import UserError  # noqa: E402

# Not where a test imports this file.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent == FOLDER:
    restart_with_huge_pages()

PACKAGES = ("jax", "jaxlib", "torch", "numpy")


def define_records_flags(*, limit: int) -> FlagGroup:
    """Which records, or which random models in their place."""
    flags.DEFINE_list("data_path", [], "Files of records, with commas. Or give --shapes.")
    flags.DEFINE_integer("limit", limit, "First records of each file; or random ones.", 1)
    flags.DEFINE_string(
        "model_path",
        None,
        "As analyze takes it. Not given: the embedded SmolLM2-135M-Instruct.",
    )
    return FlagGroup("Records", ("data_path", "limit", "model_path"))


def define_shapes_flags() -> FlagGroup:
    """Random weights of published shapes."""
    flags.DEFINE_list(
        "shapes",
        [],
        "Instead of --data_path: names of published models, with commas (SmolLM2-135M, SmolLM2-360M, "
        "Qwen2.5-0.5B, Qwen2-1.5B, Llama-3.1-8B, Llama-3.1-70B, gemma-2-9b), built with random weights "
        "and fed random tokens.",
    )
    flags.DEFINE_list("tokens", ["128"], "Tokens of a random example, several with commas.")
    flags.DEFINE_integer("responses", 32, "Response tokens of a random example.", 1)
    flags.DEFINE_integer("layers", None, "Layers of a random model. Not given: all of them.", 1)
    return FlagGroup("Random models", ("shapes", "tokens", "responses", "layers"))


def define_timing_flags(*, repeats: int) -> FlagGroup:
    """How often."""
    flags.DEFINE_integer(
        "repeats", repeats, "Rounds; in each, every contender runs once, and the order turns.", 1
    )
    return FlagGroup("Timing", ("repeats",))


def define_in_flight_flag(what: str) -> None:
    """The flag --in_flight: how many of `what` run at the same time."""
    flags.DEFINE_integer(
        "in_flight", None, f"{what} at the same time. Not given: as many as a run has batches.", 1
    )


def num_in_flight() -> int:
    """As asked, or as a run has batches on this backend."""
    from jaxgrad.measure.memory import batches_in_flight

    return flags.FLAGS.in_flight or batches_in_flight()


def define_dtype_flag() -> FlagGroup:
    """Of the model, on both sides."""
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of the weights and the arithmetic."
    )
    return FlagGroup("Computation", ("dtype",))


def counts(name: str) -> list[int]:
    """A flag of whole numbers with commas.

    Raises:
        UserError: one of them is no positive whole number, or there is none.
    """
    words = flags.FLAGS[name].value
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise UserError(
            f"--{name}={','.join(words)} is not a list of positive whole numbers; give --{name}=128,512"
        )
    return [int(word) for word in words]


def chosen(name: str, known: Sequence[str]) -> list[str]:
    """A flag of names with commas.

    Raises:
        UserError: one of them is not known.
    """
    words = flags.FLAGS[name].value
    for word in words:
        if word not in known:
            raise UserError(f"--{name}: {word!r} is not known; give some of {', '.join(known)}")
    return list(words)


def check_source() -> None:
    """Raise a `UserError` unless exactly one of --data_path and --shapes is given."""
    if bool(flags.FLAGS.data_path) == bool(flags.FLAGS.shapes):
        raise UserError(
            "give --data_path (files of records) or --shapes (random models): one of them"
        )


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    A round runs each once. Each round begins with another one, so that other work on the machine slows all
    alike. A contender was warmed up before, and returns when its work is done.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(contenders[name]))
    return seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each contender."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers of that many significant digits, in lists and dictionaries, for the line of JSON."""
    if isinstance(values, dict):
        return {name: rounded(value, digits) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [rounded(value, digits) for value in values]
    return float(f"{values:.{digits}g}") if isinstance(values, float) else values


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """LAPACK on one thread and float64 on, as in a run (`jaxgrad.measure.blas` says why)."""
    import jax

    from jaxgrad.measure.blas import single_threaded_blas

    with jax.enable_x64(True), single_threaded_blas():
        yield


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def torch_device() -> str | None:
    """Where PyTorch is to run: on JAX's kind of device; None where it cannot."""
    import jax

    if not has_torch():
        return None
    if jax.default_backend() == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else None


def synchronized(device: str | None) -> None:
    """Wait for PyTorch's work on a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def device_words() -> str:
    """The device in words, such as "cpu (x86_64, 2 cores)"."""
    import platform

    import jax

    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f" {device.device_kind}"
    return f"{device.platform}{kind} ({platform.machine()}, {os.cpu_count()} cores)"


def memory_of_process(name: str) -> int:
    """An entry of this process's status (VmHWM: peak, VmRSS: now), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def forget_peak() -> None:
    """Set this process's peak to what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(script: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """The last line that the benchmark `script` prints with these flags, as JSON.

    If it fails, this process ends with its error.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (environment or {}),
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """A line of a table: the first column to the left, the others to the right."""
    pairs = zip(cells[1:], widths[1:], strict=True)
    first = cells[0].ljust(widths[0])
    print("  ".join([first, *(cell.rjust(width) for cell, width in pairs)]), flush=True)


def print_json(benchmark: str, **content: Any) -> None:
    """The last line of a benchmark: what was measured, where, with what."""
    import jax

    from jaxgrad.results.provenance import commit

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if "torch" in sys.modules:
        content["torch_threads"] = sys.modules["torch"].get_num_threads()
    line = {
        "benchmark": benchmark,
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "versions": versions,
    }
    print(json.dumps(line | rounded(content)))
