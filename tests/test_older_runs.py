"""Runs that an earlier version wrote: they are read, exported, reported, reused and continued as before.

`older_runs/` holds one run of each form, and what that version read from it; see its README.md.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from older_runs.make import (
    FIRST_OF_UNFINISHED,
    RUNS,
    columns_of,
    study_cells,
    write_repeated,
)

import jaxgrad
from jaxgrad.measure.programs import Programs
from jaxgrad.report import read_labelled, write_report
from jaxgrad.results import iter_results, layout, read_authors_jsonl, write_authors_jsonl
from jaxgrad.study import read_study, run_study

ROOT = Path(__file__).resolve().parent.parent
OLDER = ROOT / "tests" / "older_runs"
EXPECTED = OLDER / "expected"
LATER_COLUMNS = {"expert", "part"}
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]\d+)?")


@pytest.fixture
def older(tmp_path):
    """A copy of the folder, with the model's files as old as the runs say."""
    folder = tmp_path / "older"
    shutil.copytree(OLDER, folder)
    sessions = json.loads((folder / "plain/run.json").read_text("utf-8"))["sessions"]
    for name, (size, modified) in sessions[-1]["info"]["model_files"].items():
        file = folder / "model" / name
        assert file.stat().st_size == size
        os.utime(file, ns=(modified, modified))
    return folder


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def measure(*_):
        raise AssertionError("a batch is measured")

    monkeypatch.setattr(Programs, "measure", measure)


def expected_of(name):
    return json.loads((EXPECTED / f"{name}.json").read_text("utf-8"))


def tables_of(results):
    return {"examples": results.examples, "matrices": results.matrices}


def assert_as_recorded(frame, columns):
    """Every recorded column to the last bit; all others are null."""
    found = columns_of(frame)
    for name, column in columns.items():
        assert json.dumps(found[name]) == json.dumps(column), name  # as text a NaN is itself
    later = [name for name in frame if name not in columns]
    assert frame[later].isna().all(axis=None)


def with_part(run_dir, table, change):
    """A window's table rewritten, its checksum with it: as another version would have written it."""
    identity = layout.load_run(run_dir)["identity"]
    parts = {name: (run_dir / layout.part_name(name, 0)).read_bytes() for name in layout.TABLES}
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(pa.BufferReader(parts[table]))), sink)
    parts[table] = sink.getvalue().to_pybytes()
    (run_dir / layout.part_name(table, 0)).write_bytes(parts[table])
    checksums = layout.checksum_bytes(identity, 0, parts)
    (run_dir / layout.checksum_name(0)).write_bytes(checksums)


def with_novel_column(table):
    values = pa.array(np.arange(table.num_rows) / 7)
    return table.add_column(3, "novel", values)


def files_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Reading


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_reads_as_before(name):
    columns = expected_of(name)
    for table, frame in tables_of(jaxgrad.read_results(OLDER / name)).items():
        assert_as_recorded(frame, columns[table])
    (part,) = iter_results(OLDER / name)
    for table, frame in tables_of(part).items():
        assert_as_recorded(frame, columns[table])
    assert set(part.matrices) - set(columns["matrices"]) >= LATER_COLUMNS


def test_what_is_recorded_of_an_unfinished_run_reads_as_before():
    """One window in Parquet files, and two batches of the next in the journal."""
    results = jaxgrad.read_results(OLDER / "unfinished", allow_unfinished=True)
    assert not results.run["finished"]
    columns = expected_of("unfinished")
    assert 256 < max(columns["examples"]["example_index"]["values"]) < 263
    for table, frame in tables_of(results).items():
        assert set(frame["example_index"]) >= set(range(256))
        assert_as_recorded(frame[frame["example_index"] >= FIRST_OF_UNFINISHED], columns[table])
    with pytest.raises(jaxgrad.UserError, match="256 examples in 1 finished windows and 2 batches"):
        jaxgrad.read_results(OLDER / "unfinished")


@pytest.mark.parametrize("table", layout.TABLES)
def test_an_unknown_column_is_kept(older, table):
    with_part(older / "plain", table, with_novel_column)
    for results in (jaxgrad.read_results(older / "plain"), *iter_results(older / "plain")):
        frame = tables_of(results)[table]
        np.testing.assert_array_equal(frame["novel"], np.arange(len(frame)) / 7)
        assert_as_recorded(frame.drop(columns="novel"), expected_of("plain")[table])


def test_an_unknown_column_of_one_window_is_null_in_the_others(older):
    with_part(older / "unfinished", "matrices", with_novel_column)
    results = jaxgrad.read_results(older / "unfinished", allow_unfinished=True)
    novel = results.matrices.set_index("example_index")["novel"]
    assert novel.loc[:255].notna().all() and novel.loc[256:].isna().all()


@pytest.mark.parametrize("names", [["stable_rank"], ["rank_bound", "singular_values"]])
def test_a_column_that_the_file_lacks_is_null(older, names):
    with_part(older / "statistics", "matrices", lambda table: table.drop_columns(names))
    whole = jaxgrad.read_results(OLDER / "statistics").matrices
    lacking = jaxgrad.read_results(older / "statistics").matrices
    assert list(lacking) == list(whole) and whole[names].notna().all(axis=None)
    assert lacking[names].isna().all(axis=None)
    assert (lacking.dtypes == whole.dtypes).all()
    pd.testing.assert_frame_equal(lacking.drop(columns=names), whole.drop(columns=names))


# Exporting


@pytest.mark.parametrize(
    ("name", "with_spectrum", "file"),
    [
        ("jsonl", False, "jsonl/authors.jsonl"),
        ("statistics", False, "expected/authors.jsonl"),
        ("statistics", True, "expected/authors_spectrum.jsonl"),
        ("all_weights", False, "expected/authors_all_weights.jsonl"),
    ],
)
@pytest.mark.parametrize("change", [None, with_novel_column], ids=["as_written", "unknown_column"])
def test_the_authors_form_has_the_same_bytes(older, name, with_spectrum, file, change):
    if change:
        with_part(older / name, "matrices", change)
    path = older / "exported.jsonl"
    write_authors_jsonl(iter_results(older / name), path, with_spectrum=with_spectrum)
    assert path.read_bytes() == (OLDER / file).read_bytes()


def test_an_export_reads_back():
    results = read_authors_jsonl(EXPECTED / "authors_spectrum.jsonl")
    measured = jaxgrad.read_results(OLDER / "statistics").matrices
    for name in ("layer", "projection", "frobenius_norm", "entry_max", "partner_cosine"):
        assert list(results.matrices[name]) == list(measured[name]), name
    assert results.matrices[sorted(LATER_COLUMNS)].isna().all(axis=None)


# Tables


def test_the_summary_has_the_same_text():
    command = [sys.executable, str(ROOT / "bin" / "summarize"), *RUNS, *study_cells(OLDER)]
    done = subprocess.run(command, cwd=OLDER, capture_output=True, text=True, check=True)
    assert done.stdout == (EXPECTED / "summary.txt").read_text("utf-8")


def rows_of(file):
    """A table's rows, its heading first."""
    text = file.read_text("utf-8")
    if file.suffix == ".csv":
        return [numbers_of(row) for row in csv.reader(io.StringIO(text))]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def numbers_of(row):
    """A row of CSV, with its numbers as numbers."""
    return [float(cell) if NUMBER.fullmatch(cell) else cell for cell in row]


def assert_same_tables(report, expected):
    """Each table's text, and its numbers with all digits; a table of statistics may have more of them."""
    for file in sorted(expected.iterdir()):
        old, new = rows_of(file), rows_of(report / "tables" / file.name)
        if "statistic" in old[0]:
            place = old[0].index("statistic")
            known = {row[place] for row in old}
            new = [row for row in new if row[place] in known]
        assert new == [list(map(nearly, row)) for row in old], file.name


def nearly(cell):
    """Another machine may add the same numbers in another order; a text stays as it is."""
    return cell if isinstance(cell, str) else pytest.approx(cell, rel=1e-9, abs=1e-12)


@pytest.fixture
def no_figures(monkeypatch):
    """They are slow, and tested with other runs."""
    monkeypatch.setattr("jaxgrad.report.build.write_figures", lambda *_, **__: None)


def test_a_study_is_reported_as_before(older, no_figures):
    page = run_study(
        read_study(older / "study.toml"),
        older / "study",
        report_only=True,
        say=lambda _: None,
        progress=False,
    )
    assert_same_tables(page.parent, EXPECTED / "tables")
    summary = (page.parent / "report.md").read_text("utf-8")
    for file in EXPECTED.glob("tables/*.md"):
        assert (page.parent / "tables" / file.name).read_text("utf-8") in summary, file.name


def test_exports_are_reported_as_before(tmp_path, no_figures):
    runs = [("none", "jsonl/authors.jsonl"), ("detailed", "expected/authors.jsonl")]
    cells = read_labelled([(label, str(OLDER / file)) for label, file in runs])
    page = write_report(cells, tmp_path / "report", title="Exports")
    assert_same_tables(page.parent, EXPECTED / "tables_of_exports")


# Running again


FLAGS = {
    "plain": {"limit": 2},
    "jsonl": {"start": 1, "limit": 2, "output_format": "jsonl"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_second_run_computes_nothing_and_changes_nothing(older, nothing_is_measured, name):
    before, lines = files_of(older / name), []
    (summary,) = jaxgrad.run_analysis(
        model_path=str(older / "model"),
        data_paths=[older / "data/none.json"],
        output_dir=older / name,
        say=lines.append,
        progress=False,
        **FLAGS[name],
    )
    assert summary.reused and summary.counts == json.loads(before["run.json"])["counts"]
    assert any("finished: nothing to compute" in line for line in lines)
    assert files_of(older / name) == before


def test_a_second_run_of_a_study_computes_nothing(older, nothing_is_measured, monkeypatch):
    monkeypatch.setattr("jaxgrad.report.build.write_report", lambda *_, **__: "index.html")
    before, lines = files_of(older / "study"), []
    config = read_study(older / "study.toml")
    run_study(config, older / "study", say=lines.append, progress=False)
    assert sum("nothing to compute" in line for line in lines) == 4
    assert files_of(older / "study") == before


def test_an_unfinished_run_is_continued(older):
    """What is recorded stays to the last bit; the rest are the same records as in the first window."""
    write_repeated(older)
    run_dir, lines = older / "unfinished", []
    before = files_of(run_dir)
    (summary,) = jaxgrad.run_analysis(
        model_path=str(older / "model"),
        data_paths=[older / "data/repeated.json"],
        output_dir=run_dir,
        options=jaxgrad.AnalyzeOptions(
            chat="no", batch_tokens=64, parameters=r"layers\.1\.self_attn\.v_proj"
        ),
        say=lines.append,
        progress=False,
    )
    assert not summary.reused and summary.counts["ok"] == 264
    after = files_of(run_dir)
    for name in (*(layout.part_name(table, 0) for table in layout.TABLES), layout.checksum_name(0)):
        assert after[name] == before[name], name
    results = jaxgrad.read_results(run_dir)
    assert len(results.run["sessions"]) == 2
    for table, frame in tables_of(results).items():
        columns = expected_of("unfinished")[table]
        recorded = columns["example_index"]["values"]
        assert_as_recorded(frame[frame["example_index"].isin(recorded)], columns)
    matrices = results.matrices
    numbers = matrices.select_dtypes("float64").astype(np.float64)
    # The records are two questions in turn. On another machine the last digits may differ.
    np.testing.assert_allclose(numbers[256:], numbers[:8], rtol=1e-4, atol=1e-6)
    assert list(results.examples["example_index"]) == list(range(264))
