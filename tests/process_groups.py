"""Starts real processes of bin/analyze that share a run on this machine, on a tiny model."""

import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from tiny_models import Tiny, save_tiny

ROOT = Path(__file__).resolve().parent.parent
ANALYZE = ROOT / "bin" / "analyze"
# As in jaxgrad.runs.plan. That module imports JAX, which scripts that only start processes do not need.
WINDOW = 256
# All examples have one batch shape, because each process compiles each shape.
FLAGS = [
    "--chat=no",
    "--max_length=32",
    "--batch_tokens=32",
    r"--parameters=layers\.0\.self_attn\.q_proj",
]


def make_inputs(folder: Path, num_records: int) -> None:
    """Writes a model and a data file. Some records cannot be measured."""
    save_tiny(Tiny(4, 2, tied=False, width=52), folder / "model")
    rows = [
        {"instruction": "what" + " a b" * (i % 2), "input": "", "output": f"so it is {i}"}
        for i in range(num_records)
    ]
    for i in range(3, num_records, 101):
        rows[i]["output"] = ""
    (folder / "data.json").write_text(json.dumps(rows))


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(folder: Path, devices: int = 1) -> dict[str, str]:
    """The environment of the processes, which share a cache of compiled programs.

    Args:
        folder: has the cache.
        devices: CPU devices of each process. They share few cores, so one may wait long for the others.
    """
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    jax = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    if devices > 1:
        jax["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_"))}
    return kept | jax | threads


@dataclasses.dataclass
class Ended:
    """How one process ended."""

    code: int
    stdout: str
    stderr: str


class Processes:
    """Processes that share a run, started as on several hosts."""

    def __init__(
        self,
        folder: Path,
        output_dir: Path,
        count: int,
        *,
        timeout: int = 5,
        flags: tuple = (),
        devices: int = 1,
    ) -> None:
        self.count = count
        command = [sys.executable, str(ANALYZE), f"--model_path={folder / 'model'}"]
        command += [f"--data_path={folder / 'data.json'}", f"--output_dir={output_dir}", *FLAGS]
        command += [f"--process_timeout={timeout}", *flags]
        if count > 1:
            command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        self.processes = [
            subprocess.Popen(
                [*command, *([f"--process_id={k}"] if count > 1 else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(folder, devices),
            )
            for k in range(count)
        ]

    def signal(self, process: int, number: signal.Signals) -> bool:
        """Sends a signal to a process. Whether it was still running."""
        running = self.processes[process].poll() is None
        self.processes[process].send_signal(number)
        return running

    def wait(self, seconds: float) -> list[Ended]:
        """How all of them ended.

        Raises:
            TimeoutError: one did not end within `seconds`; all are killed.
        """
        until = time.monotonic() + seconds
        try:
            ended = []
            for process in self.processes:
                out, err = process.communicate(timeout=max(0.1, until - time.monotonic()))
                ended.append(Ended(process.returncode, out, err))
            return ended
        except subprocess.TimeoutExpired as error:
            for process in self.processes:
                process.kill()
            told = [process.communicate()[1][-800:] for process in self.processes]
            raise TimeoutError(f"not all ended within {seconds} s: {told}") from error


def start_and_wait(
    folder: Path, output_dir: Path, count: int, batches: int, **options
) -> Processes:
    """Starts processes, and waits until they have recorded so many batches of one example each."""

    def num_recorded() -> int:
        merged = len(list(output_dir.glob("examples/part-*.parquet")))
        return len(list(output_dir.glob("journal/*.batch"))) + WINDOW * merged

    enough = num_recorded() + batches
    processes = Processes(folder, output_dir, count, **options)
    until = time.monotonic() + 300
    while time.monotonic() < until and num_recorded() < enough:
        if any(process.poll() is not None for process in processes.processes):
            raise AssertionError(f"ended before {batches} batches: {processes.wait(100)}")
        time.sleep(0.01)
    return processes


def digest(output_dir: Path) -> str:
    """A digest of all Parquet files: names and bytes."""
    found = hashlib.sha256()
    for path in sorted(output_dir.rglob("*.parquet")):
        found.update(str(path.relative_to(output_dir)).encode() + path.read_bytes())
    return found.hexdigest()


def faults(output_dir: Path, num_records: int, num_matrices: int) -> list[str]:
    """What is wrong with a finished run: rows missing, rows twice, files left over, wrong counts."""
    run = json.loads((output_dir / "run.json").read_text())
    examples = pd.read_parquet(output_dir / "examples")
    matrices = pd.read_parquet(output_dir / "matrices")
    names = ["example_index", "layer", "projection"]
    measured = int((examples["status"] == "ok").sum())
    wrong = {
        "not finished": not run["finished"],
        "an example twice": bool(examples["example_index"].duplicated().any()),
        "an example missing": set(examples["example_index"]) != set(range(num_records)),
        "a matrix twice": bool(matrices.duplicated(names).any()),
        "a matrix missing": len(matrices) != measured * num_matrices,
        "a journal": (output_dir / "journal").exists(),
        "temporaries": bool(list(output_dir.rglob(".*.tmp"))),
        "wrong counts": run["counts"]["examples"] != num_records or run["counts"]["ok"] != measured,
    }
    return [what for what, found in wrong.items() if found]
