"""Makes the runs of this folder with the program of an earlier commit; README.md says how."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

DATA = ("none", "detailed", "none_irrelevant", "detailed_irrelevant")
NUM_RECORDS = 4
RUNS = {
    "plain": ("--data_path=data/none.json", "--limit=2"),
    "statistics": (
        *("--data_path=data/detailed.json", "--limit=2"),
        *("--similarity", "--spectrum", "--extremes"),
    ),
    "all_weights": (
        *("--data_path=data/none.json", "--limit=1"),
        *("--parameters=all", "--extremes"),
    ),
    "jsonl": ("--data_path=data/none.json", "--start=1", "--limit=2", "--output_format=jsonl"),
    "flawed": ("--data_path=data/flawed.json", "--max_length=256"),
}
UNFINISHED = (
    *("--data_path=data/repeated.json", "--chat=no", "--batch_tokens=64"),
    r"--parameters=layers\.1\.self_attn\.v_proj",
)
# A window is 256 examples: the unfinished run has one, and two batches of the next. Few shapes, because a
# test compiles them.
QUESTIONS = {"How many hours has a day?": "24", "How many days has a week?": "7 days"}
REPEATS, BATCHES_BEFORE_KILL = 132, 2
FIRST_OF_UNFINISHED = 248  # the examples before are the same records again
STUDY = """\
title = "A study of an earlier version"
about = "Do its tables stay as they are?"
data_root = "data"

[analyze]
similarity = true

[report]
num_resamples = 200

[[models]]
name = "Tiny"
path = "./model"
role = "instruct"

[[data]]
name = "Demo"
kind = "reasoning"
correct = {none = "none.json", detailed = "detailed.json"}
irrelevant = {none = "none_irrelevant.json", detailed = "detailed_irrelevant.json"}
"""


def write_repeated(folder: Path) -> None:
    """data/repeated.json, for the unfinished run: too large to be kept, for what is in it."""
    rows = [{"instruction": q, "input": "", "output": a} for q, a in QUESTIONS.items()]
    (folder / "data/repeated.json").write_text(json.dumps(rows * REPEATS), "utf-8")


def columns_of(frame: Any) -> dict[str, dict[str, Any]]:
    """A table's columns for JSON: floats keep every bit, a missing text or integer is None."""
    return {
        name: {
            "dtype": str(column.dtype),
            "values": [_json_value(value) for value in column.tolist()],
        }
        for name, column in frame.items()
    }


def _json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_json_value(one) for one in value]
    return value if isinstance(value, str | int | float) else None  # None or pandas' NA


def study_cells(folder: Path) -> list[str]:
    """The study's runs as `summarize` takes them."""
    cells = sorted(path.parent for path in folder.glob("study/runs/*/*/run.json"))
    return [str(path.relative_to(folder)) for path in cells]


def main() -> None:
    """Make everything in the working directory, where `program` is the clone."""
    folder = Path.cwd()
    _write_inputs(folder)
    for name, flags in RUNS.items():
        model = "flawed_model" if name == "flawed" else "model"
        _program("analyze", f"--model_path={model}", f"--output_dir={name}", *flags)
    _run_and_kill("analyze", "--model_path=model", "--output_dir=unfinished", *UNFINISHED)
    _program("study", "--config=study.toml", "--output_dir=study")

    (folder / "expected").mkdir()
    _write_frames(folder)
    summary = _program("summarize", *RUNS, *study_cells(folder))
    (folder / "expected/summary.txt").write_text(summary, "utf-8")
    for name, of, *flags in (
        ("authors.jsonl", "statistics"),
        ("authors_spectrum.jsonl", "statistics", "--spectrum"),
        ("authors_all_weights.jsonl", "all_weights"),
    ):
        _program("export", f"--run_dir={of}", f"--output_path=expected/{name}", *flags)
    _keep_tables(folder / "study/report", folder / "expected/tables")
    runs = ("--runs=none=jsonl/authors.jsonl", "--runs=detailed=expected/authors.jsonl")
    _program("report", "--output_dir=report", "--title=Exports", *runs)
    _keep_tables(folder / "report", folder / "expected/tables_of_exports")
    # What is large, and made again or not looked at: see README.md.
    for name in ("flawed_model", "report", "study/report"):
        shutil.rmtree(folder / name)
    (folder / "data/repeated.json").unlink()


def _write_inputs(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file
    from tiny_models import Tiny, save_tiny

    tiny = Tiny(4, 2, tied=False, width=12, mlp_width=7, head_size=4, num_layers=4)
    for name in ("model", "flawed_model"):
        save_tiny(tiny, folder / name)
        config = folder / name / "config.json"
        longer = json.loads(config.read_text("utf-8")) | {"max_position_embeddings": 1031}
        config.write_text(json.dumps(longer, indent=2) + "\n", "utf-8")
    # One token overflows: of the records of data/flawed.json only one has it.
    vocabulary = json.loads((folder / "model/tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    file = folder / "flawed_model/model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][vocabulary["#"]] = 3e38
    save_file(weights, file, {"format": "pt"})

    (folder / "data").mkdir()
    for name in DATA:
        rows = json.loads((folder / f"program/configs/demo/{name}.json").read_text("utf-8"))
        text = json.dumps(rows[:NUM_RECORDS], indent=1, ensure_ascii=False)
        (folder / f"data/{name}.json").write_text(text + "\n", "utf-8")
    write_repeated(folder)
    flawed = [
        {"instruction": "How many hours has a day?", "input": "", "output": "24"},
        {"instruction": "How many hours has a week?", "input": "", "output": ""},
        {"instruction": "How many? " * 60, "input": "", "output": "60"},
        {"instruction": "How many hours has a # day?", "input": "", "output": "24"},
        {"instruction": "Count.", "input": "", "output": "one, two, three, " * 40},
    ]
    (folder / "data/flawed.json").write_text(json.dumps(flawed, indent=1) + "\n", "utf-8")
    (folder / "study.toml").write_text(STUDY, "utf-8")


def _program(name: str, *arguments: str) -> str:
    command = [sys.executable, f"program/bin/{name}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _run_and_kill(name: str, *arguments: str) -> None:
    """The program, killed when it has recorded `BATCHES_BEFORE_KILL` batches of the second window."""
    code = "import make, sys; make.killed(sys.argv[1:])"
    command = [sys.executable, "-c", code, f"program/bin/{name}", *arguments]
    # What bin/ starts again with for its own sake is set already: it must not lose `killed`.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done


def killed(arguments: list[str]) -> None:
    """Run a file of bin/ in this process, which does not survive it."""
    import runpy

    from jaxgrad.results import RunDirectory

    write_batch, recorded = RunDirectory.write_batch, []

    def write_and_die(self: Any, window: int, batch: int, results: Any) -> None:
        write_batch(self, window, batch, results)
        recorded.extend([batch] if window else [])
        if len(recorded) == BATCHES_BEFORE_KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.write_batch = write_and_die  # type: ignore[method-assign]
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))  # as if it had been started by its name
    runpy.run_path(arguments[0], run_name="__main__")


def _keep_tables(report: Path, place: Path) -> None:
    """The tables with all digits and as they are shown, not those for LaTeX."""
    place.mkdir()
    for file in (report / "tables").iterdir():
        if file.suffix in (".csv", ".md"):
            shutil.copy(file, place)


def _write_frames(folder: Path) -> None:
    """What `read_results` gave of each run."""
    import jaxgrad

    for name in (*RUNS, "unfinished"):
        results = jaxgrad.read_results(folder / name, allow_unfinished=True)
        frames = {"examples": results.examples, "matrices": results.matrices}
        if name == "unfinished":
            frames = {
                table: frame[frame["example_index"] >= FIRST_OF_UNFINISHED]
                for table, frame in frames.items()
            }
        lines = [
            f" {json.dumps(table)}: {{\n"
            + ",\n".join(
                f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in columns_of(frame).items()
            )
            + "\n }"
            for table, frame in frames.items()
        ]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (folder / f"expected/{name}.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
