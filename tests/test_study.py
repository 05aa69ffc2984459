"""Running studies: what is there to do, and that missing parts cost only themselves."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError
from tiny_models import Tiny, save_tiny

import jaxgrad
from jaxgrad.analysis import Resampling
from jaxgrad.checkpoints.load import Checkpoint
from jaxgrad.errors import OutputError, UserError
from jaxgrad.measure import stream
from jaxgrad.measure.programs import Programs
from jaxgrad.report.cells import Role
from jaxgrad.study import plan_study, read_study, run_study

ROOT = Path(__file__).resolve().parent.parent
STUDY = """
title = "A title"
about = "A question"
data_root = "data"

[analyze]
max_length = 48
batch_tokens = 1
limit = 3
date = "2024-02-29"

[report]
num_resamples = 200

[[models]]
name = "Tiny base"
path = "./model"
role = "base"
pair = "tiny"

[[models]]
name = "Tiny-it"
path = "./nowhere"
role = "instruct"
pair = "tiny"

[[data]]
name = "AQuA"
kind = "reasoning"
correct = {none = "none.json", detailed = "detailed.json"}
irrelevant = {none = "absent.json"}

[[data]]
name = "Wiki"
correct = {popular = "broken.json"}
"""


def written(folder, text):
    path = folder / "study.toml"
    path.write_text(text)
    return path


def read(folder, text):
    return read_study(written(folder, text))


# What there is to do


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A study with one model of two, and two files of four, one of the others broken."""
    folder = tmp_path_factory.mktemp("study")
    save_tiny(Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52), folder / "model")
    (folder / "data").mkdir()
    for name, output in (("none", "3"), ("detailed", "1 and 2 is 3")):
        rows = [{"instruction": f"What is {i}?", "input": "", "output": output} for i in range(4)]
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    (folder / "data" / "broken.json").write_text("[{")
    written(folder, STUDY)
    return folder


@pytest.fixture
def reports(monkeypatch):
    """The calls of `write_report`, which is not what is tested here."""
    calls = []

    def write_report(cells, output_dir, **rest):
        calls.append((cells, output_dir, rest))
        return output_dir / "index.html"

    module = types.ModuleType("jaxgrad.report.build")
    module.write_report = write_report
    monkeypatch.setitem(sys.modules, "jaxgrad.report.build", module)
    return calls


@pytest.fixture
def measured(monkeypatch):
    """The number of batches measured, as a list's length; `measured.stop` of them, then Ctrl-C."""
    original = Programs.measure

    class Measured(list):
        stop = 10**9

    counted = Measured()

    def measure(self, *arguments):
        if len(counted) == counted.stop:
            raise KeyboardInterrupt
        counted.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Programs, "measure", measure)
    monkeypatch.setattr(stream, "batches_in_flight", lambda _: 1)  # so that the order is certain
    return counted


def run(folder, output_dir, **options):
    lines = []
    config = read_study(folder / "study.toml", limit=options.pop("limit", None))
    run_study(config, output_dir, say=lines.append, progress=False, **options)
    return lines


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        module = types.ModuleType("jaxgrad.report.build")
        module.write_report = lambda *a, **k: calls.append((a, k)) or "index.html"
        patch.setitem(sys.modules, "jaxgrad.report.build", module)
        output_dir = tmp_path_factory.mktemp("runs") / "out"
        lines = run(home, output_dir)
    return output_dir, lines, calls


def test_the_grid(home, tmp_path):
    plan = plan_study(read_study(home / "study.toml"), tmp_path / "out")
    assert [cell.title for cell in plan.cells[:4]] == [
        "Tiny base: AQuA, none",
        "Tiny base: AQuA, detailed",
        "Tiny base: AQuA, none, irrelevant",
        "Tiny base: Wiki, popular",
    ]
    assert plan.cells[2].directory == tmp_path / "out/runs/tiny-base/aqua.none.irrelevant"
    assert [plan.state(cell) for cell in plan.cells] == [
        *("to measure", "to measure", "without data", "without data"),
        *("without model", "without model", "without data", "without data"),
    ]
    # A base model gets no chat template, though this tokenizer has one.
    assert [cell.options.chat for cell in plan.cells] == ["no"] * 4 + ["auto"] * 4
    assert plan.config.model_pairs() == [("Tiny base", "Tiny-it")]
    summary, *missing = plan.summary()
    assert "8 cells (2 models, 2 data sets): 2 to measure, 4 without data, 2 without mod" in summary
    assert len([line for line in missing if "missing data" in line]) == 4
    assert any("nowhere: no such file" in line and "--model_path" not in line for line in missing)
    grid = "\n".join(plan.grid())
    assert "3 of 4 records; to measure" in grid and "absent.json: no such file" in grid
    assert "[reasoning]" in grid and "Tiny-it (missing: " in grid
    assert not (tmp_path / "out").exists()


def test_an_unset_variable_costs_its_files_alone(home, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXGRAD_NOWHERE", raising=False)
    text = STUDY.replace("./nowhere", "${JAXGRAD_NOWHERE}/m").replace(
        '"absent.json"', '"${JAXGRAD_NOWHERE}/a.json"'
    )
    (tmp_path / "data").symlink_to(home / "data")
    plan = plan_study(read(tmp_path, text), tmp_path / "out")
    assert "JAXGRAD_NOWHERE is not set" in plan.cells[2].reason
    assert "JAXGRAD_NOWHERE is not set" in plan.missing_models["Tiny-it"]
    monkeypatch.setenv("JAXGRAD_NOWHERE", str(home / "data"))
    config = read(tmp_path, text)
    assert config.data_path("${JAXGRAD_NOWHERE}/a.json") == home / "data" / "a.json"


# Running


def test_what_is_there_is_measured_and_the_rest_is_named(finished):
    output_dir, lines, [((cells, report_dir), rest)] = finished
    assert [cell.role for cell in cells] == [
        Role("Tiny base", "AQuA", "none"),
        Role("Tiny base", "AQuA", "detailed"),
    ]
    assert report_dir == output_dir / "report"
    assert rest["title"] == "A title" and rest["about"] == "A question"
    assert rest["model_pairs"] == [("Tiny base", "Tiny-it")]
    assert rest["resampling"] == Resampling(num_resamples=200)
    missing = rest["unavailable"]
    assert list(missing) == [
        "AQuA, none, irrelevant, all models",
        "Wiki, popular, all models",
        "Tiny-it: AQuA, none",
        "Tiny-it: AQuA, detailed",
    ]
    assert "absent.json: no such file" in missing["AQuA, none, irrelevant, all models"]
    assert "broken.json" in missing["Wiki, popular, all models"]
    assert "nowhere: no such file" in missing["Tiny-it: AQuA, none"]
    assert all(any(why in line for line in lines) for why in missing.values())
    second = r"\[2 of 8\] Tiny base: AQuA, detailed \(about \d+ min left for Tiny base\)"
    assert any(re.fullmatch(second, line) for line in lines)
    assert sum(line.startswith("memory: ") for line in lines) == 2 and lines[-1] == "index.html"
    identity = json.loads((cells[0].path / "run.json").read_text())["identity"]
    assert identity["data"]["limit"] == 3 and identity["options"]["date"] == "2024-02-29"


def test_a_second_run_computes_nothing(home, finished, reports, measured):
    lines = run(home, finished[0])
    assert not measured and sum("nothing to compute" in line for line in lines) == 2
    assert len(reports[0][0]) == 2


def test_finished_runs_are_reported_without_their_data_and_model(
    home, finished, tmp_path, reports, measured
):
    for how in ("report_only", "again"):
        written(tmp_path, STUDY)
        lines = run(tmp_path, finished[0], report_only=how == "report_only")
        assert len(reports[-1][0]) == 2 and not measured
    assert any("Tiny-it, all 4 cells" in line or "all models" in line for line in lines)


def test_report_only_lists_what_was_not_run(home, finished, tmp_path, reports, measured):
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out/runs/tiny-base/aqua.detailed.correct")
    run(home, tmp_path / "out", report_only=True)
    [(cells, _, rest)] = reports
    assert len(cells) == 1 and not measured
    assert rest["unavailable"]["AQuA, detailed, all models"] == "not run yet"
    with pytest.raises(UserError, match="run without --report_only"):
        run(home, tmp_path / "empty", report_only=True)


def test_interrupted_and_continued(home, finished, tmp_path, reports, measured):
    measured.stop = 4  # in the second cell, one of three examples
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out")
    assert not reports
    measured.stop = 10**9
    run(home, tmp_path / "out")
    assert len(measured) == 6 and len(reports) == 1
    for cell in finished[2][0][0][0]:
        again = tmp_path / "out" / cell.path.relative_to(finished[0])
        expected = jaxgrad.read_results(cell.path).matrices
        assert jaxgrad.read_results(again).matrices.equals(expected)


def test_another_configuration_is_refused_before_anything_is_done(home, finished, measured):
    with pytest.raises(OutputError, match=r"^Tiny base: AQuA, none: .*limit is 3 there, 2 here"):
        run(home, finished[0], limit=2)
    run_json = finished[0] / "runs/tiny-base/aqua.detailed.correct/run.json"
    text = run_json.read_text()
    run_json.write_text("{")
    try:
        with pytest.raises(OutputError, match=r"^Tiny base: AQuA, detailed: .*damaged"):
            run(home, finished[0])
    finally:
        run_json.write_text(text)
    assert not measured


def test_a_run_keeps_the_day_it_was_begun_on(home, finished, tmp_path):
    written(tmp_path, STUDY.replace('date = "2024-02-29"', ""))
    (tmp_path / "data").symlink_to(home / "data")
    plan = plan_study(read_study(tmp_path / "study.toml"), finished[0])
    assert {cell.options.date for cell in plan.cells} == {"2024-02-29"}


def test_an_option_that_does_not_fit_the_model_is_its_cells_reason(home, tmp_path, reports):
    shutil.copytree(home, tmp_path / "home")
    written(tmp_path / "home", STUDY.replace("max_length = 48", "max_length = 999"))
    with pytest.raises(UserError, match=r"not one cell is there .*257 positions.*mend one of"):
        run(tmp_path / "home", tmp_path / "out")
    assert not reports


def test_weights_that_cannot_be_read_are_tried_once_more_and_cost_their_model(
    home, tmp_path, reports, monkeypatch
):
    tried = []

    def load(self, dtype, *, mesh=None, progress=False, exchange=None):
        tried.append(self.name)
        raise UserError("the weights are damaged")

    monkeypatch.setattr(Checkpoint, "load", load)
    with pytest.raises(UserError, match="Tiny base: AQuA, none: the weights are damaged"):
        run(home, tmp_path / "out")
    assert len(tried) == 2 and not reports


@pytest.mark.parametrize("error", [MemoryError(), JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TB")])
@pytest.mark.parametrize("where", [(Programs, "measure"), (Checkpoint, "load")])
def test_memory_that_does_not_suffice(home, tmp_path, reports, monkeypatch, where, error):
    """Each of two cells is tried; weights are tried twice, and then their model is given up."""
    tried = []

    def fail(*arguments, **options):
        tried.append(1)
        raise error

    monkeypatch.setattr(*where, fail)
    with pytest.raises(UserError, match="memory is too small"):
        run(home, tmp_path / "out")
    # Of a cell's three batches the next may have begun before the first one's error is seen.
    assert 2 <= len(tried) <= (6 if where[0] is Programs else 2)


def test_another_error_of_the_device_is_a_bug_and_stops(home, tmp_path, monkeypatch):
    def measure(*arguments):
        raise JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(Programs, "measure", measure)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        run(home, tmp_path / "out")


def test_the_binary_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "bin" / "study"), f"--config={tmp_path}/no.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
