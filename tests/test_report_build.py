"""A report from runs to files: what is written, what a second one replaces, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from analysis_runs import PROJECTIONS, example, results, set_of
from checkpoint_files import write_json, write_model

import jaxgrad
from jaxgrad.analysis import Resampling, example_set
from jaxgrad.command_line import _flag_for_each
from jaxgrad.errors import UserError
from jaxgrad.report import Cell, Role, read_labelled, read_y_limits, write_report
from jaxgrad.report.cells import parse_label
from jaxgrad.results import write_authors_jsonl
from jaxgrad.results.layout import run_bytes

REPORT = Path(__file__).parent.parent / "bin" / "report"
FEW = Resampling(num_resamples=100, num_permutations=100)
RECORDS = [{"instruction": f"Say {w}.", "input": "", "output": w} for w in ("so", "that", "it")]


def cell(role, level=1.0, count=6, seed=0, **options):
    value_ELP = level * np.random.default_rng(seed).uniform(0.9, 1.1, (count, 5, 4))
    return Cell(role, "", set_of(value_ELP, role.title, options=options), None)


def run_of(level=1.0, count=6, seed=0):
    """A run of five layers with all that the authors' form has."""
    norm_ELP = level * np.random.default_rng(seed).uniform(0.9, 1.1, (count, 5, 4))
    columns = ("sigma_max", "sigma_min", "frobenius_norm", "entry_mean", "entry_max", "entry_min")
    examples = [
        example(e, norm_LP, **{name: norm_LP / 2 for name in columns})
        for e, norm_LP in enumerate(norm_ELP)
    ]
    return results(examples, num_layers=5)


def authors_file(path, level=1.0, count=6, seed=0):
    """The same in the authors' form."""
    write_authors_jsonl(run_of(level, count, seed), path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of a tiny model, and one with another protocol."""
    place = tmp_path_factory.mktemp("runs")
    model = write_model(place / "tiny")
    found = {}
    for name, words, protocol in (
        ("fast", 1, "paper"),
        ("slow", 4, "paper"),
        ("clean", 1, "clean"),
    ):
        records = [record | {"output": " ".join([record["output"]] * words)} for record in RECORDS]
        options = jaxgrad.AnalyzeOptions(
            max_length=32, chat="no", parameters="k_proj", protocol=protocol
        )
        found[name] = place / name
        jaxgrad.run_analysis(
            model_path=str(model),
            data_paths=[write_json(place / f"{name}.json", records)],
            output_dir=found[name],
            options=options,
            say=lambda _: None,
            progress=False,
        )
    return found


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_report_has_its_page_tables_and_figures(tmp_path):
    cells = [cell(Role("m", "AQuA", "none"), 3.0), cell(Role("m", "AQuA", "detailed"), 1.0, seed=1)]
    page = write_report(cells, tmp_path / "out", title="A <title>", resampling=FEW)
    assert page == tmp_path / "out" / "index.html"
    files = files_of(tmp_path / "out")
    listed = json.loads(files.pop("report.json"))["files"]
    assert sorted(files) == sorted(listed)
    for name in ("tables/mad_aqua.md", "tables/mad_aqua.csv", "tables/mad_aqua.tex", "report.md"):
        assert files[name]
    assert {name.rsplit(".")[-1] for name in files if name.startswith("figures/")} == {"svg", "png"}
    assert b"A &lt;title&gt;" in files["index.html"]
    assert os.listdir(tmp_path) == ["out"]  # nothing half made is left


def test_a_second_report_replaces_the_first_and_keeps_what_is_not_its_own(tmp_path):
    out = tmp_path / "out"
    roles = [Role("m", name, "none") for name in ("AQuA", "GSM8K")]
    write_report([cell(role) for role in roles], out, title="one", resampling=FEW)
    (out / "mine.txt").write_text("kept")
    assert (out / "tables" / "mad_gsm8k.csv").exists()
    write_report([cell(roles[0])], out, title="two", resampling=FEW)
    assert not (out / "tables" / "mad_gsm8k.csv").exists()
    assert (out / "mine.txt").read_text() == "kept"
    first = files_of(out)
    write_report([cell(roles[0])], out, title="two", resampling=FEW)
    assert files_of(out) == first  # the same study gives the same bytes


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="no report of ours"):
        write_report([cell(Role("m", "", "none"))], tmp_path, title="", resampling=FEW)
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot be read"):
        write_report([cell(Role("m", "", "none"))], tmp_path, title="", resampling=FEW)


def test_a_manifest_cannot_reach_outside_its_directory(tmp_path):
    outside = tmp_path / "precious"
    outside.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"files": ["../precious", str(outside)]}))
    write_report([cell(Role("m", "", "none"))], out, title="", resampling=FEW)
    assert outside.read_text() == "kept"


def test_cells_that_cannot_be_compared_are_refused(tmp_path):
    roles = [Role("m", "", "none"), Role("m", "", "detailed")]
    cells = [cell(roles[0]), cell(roles[1], protocol="clean")]
    with pytest.raises(UserError, match="protocol"):
        write_report(cells, tmp_path / "out", title="", resampling=FEW)
    with pytest.raises(UserError, match="its own label"):
        write_report([cell(roles[0])] * 2, tmp_path / "out", title="", resampling=FEW)
    with pytest.raises(UserError, match="no run"):
        write_report([], tmp_path / "out", title="", resampling=FEW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("label", "model", "role"),
    [
        ("none", None, Role("", "", "none")),
        ("AQuA/none", None, Role("", "AQuA", "none")),
        ("AQuA/none/irrelevant", None, Role("", "AQuA", "none", "irrelevant")),
        ("m / AQuA/none/correct", "m", Role("", "AQuA", "none")),
    ],
)
def test_a_label_names_a_role(label, model, role):
    assert parse_label(label) == (model, role)


@pytest.mark.parametrize("label", ["", "a//b", "a/b/c", "m/a/b/c/d", "m/a/b/wrong"])
def test_another_label_is_refused(label):
    with pytest.raises(UserError, match="label"):
        parse_label(label)


def test_the_authors_files_are_of_the_model_that_the_others_name(tmp_path, runs):
    file = authors_file(tmp_path / "a.jsonl")
    cells = read_labelled([("x/fast", str(runs["fast"])), ("y/fast", str(file))])
    name = cells[0].role.model
    assert name != "unknown model" and cells[1].role.model == name
    assert cells[1].examples.label == f"{name}, y, fast"
    alone = read_labelled([("fast", str(file))])
    assert alone[0].role.model == "unknown model"
    assert alone[0].examples.projections == PROJECTIONS


def test_an_exported_run_gives_the_report_of_the_run(tmp_path):
    levels = {"none": 3.0, "detailed": 1.0}
    own, labels = [], []
    for seed, (setting, level) in enumerate(levels.items()):
        role = Role("m", "AQuA", setting)
        examples = example_set(run_of(level, 24, seed), f"m, {role.title}")
        own.append(Cell(role, "", examples, None))
        file = authors_file(tmp_path / f"{setting}.jsonl", level, 24, seed)
        labels.append((f"m/AQuA/{setting}/correct", str(file)))
    reports = []
    for name, cells in (("own", own), ("file", read_labelled(labels))):
        write_report(cells, tmp_path / name, title="t", resampling=FEW)
        reports.append(files_of(tmp_path / name))
    one, other = reports
    for name in ("tables/mad_aqua.csv", "tables/mad_segments_aqua.csv", "tables/settings.csv"):
        assert one[name] == other[name]
    # All statistics but the one that needs response tokens, which the form does not have.
    rows = one["tables/statistics.csv"].splitlines()
    kept = [row for row in rows if b"summed loss" not in row]
    assert len(kept) == len(rows) - 2
    assert kept == other["tables/statistics.csv"].splitlines()
    curves = "figures/curves.m.aqua.nuclear_norm.svg"
    assert one[curves] == other[curves]
    assert b"its response tokens are unknown" in other["report.md"]


@pytest.mark.parametrize(
    ("text", "limits"), [("shared", "shared"), ("free", "free"), ("0,2.5", (0.0, 2.5))]
)
def test_limits_of_figures(text, limits):
    assert read_y_limits(text) == limits


@pytest.mark.parametrize("text", ["", "1", "2,1", "a,b", "0,inf", "1,2,3"])
def test_other_limits_are_refused(text):
    with pytest.raises(UserError, match="--y_limits"):
        read_y_limits(text)


def test_values_after_a_flag_belong_to_it():
    given = ["report", "--runs", "a=1", "b=2", "--output_dir", "D", "--runs=c=3", "d=4", "--x"]
    assert _flag_for_each(given, "runs") == [
        "report", "--runs=a=1", "--runs=b=2", "--output_dir", "D", "--runs=c=3", "--runs=d=4", "--x",
    ]  # fmt: skip
    assert _flag_for_each(given, None) == given


# bin/report, as a user sees it


def report(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(REPORT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
    )


def test_the_binary_reports_on_runs_and_names_the_page(tmp_path, runs):
    done = report(
        "--runs", f"fast={runs['fast']}", f"slow={runs['slow']}", "--output_dir=out",
        "--num_resamples=200", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "report: out/index.html"
    page = (tmp_path / "out" / "index.html").read_text()
    assert str(runs["fast"]) not in page  # no path of the machine that made it
    assert re.search(r"fast", page)


def refused(*arguments, cwd):
    done = report(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "comparing" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not (cwd / "out").exists()
    return lines[0]


def test_what_the_binary_refuses_in_one_line(tmp_path, runs):
    out = "--output_dir=out"
    fast = f"fast={runs['fast']}"
    assert "--runs is missing" in refused(out, cwd=tmp_path)
    assert "--output_dir is missing" in refused("--runs", fast, cwd=tmp_path)
    assert "not of the form A=B" in refused("--runs", "fast", out, cwd=tmp_path)
    assert "does not exist" in refused("--runs", "fast=nowhere", out, cwd=tmp_path)
    assert "no run.json" in refused("--runs", f"fast={tmp_path}", out, cwd=tmp_path)
    both = ("--runs", fast, f"clean={runs['clean']}")
    assert "protocol" in refused(*both, out, cwd=tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(authors_file(tmp_path / "a.jsonl").read_bytes() + b'{"loss": 1\n')
    assert "line 7" in refused("--runs", f"fast={broken}", out, cwd=tmp_path)
    part = tmp_path / "part"
    part.mkdir()
    run = json.loads((runs["fast"] / "run.json").read_text()) | {"finished": False}
    run.pop("sha256")
    (part / "run.json").write_bytes(run_bytes(run))
    assert "not finished" in refused("--runs", f"fast={part}", out, cwd=tmp_path)
