"""Reports by more statistics, of another loss, of experts: what is added, said and refused."""

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from analysis_runs import example, identity, results

from jaxgrad.analysis import DEFAULT_STATISTICS, Resampling, example_set
from jaxgrad.errors import UserError
from jaxgrad.projections import PROJECTION_NAMES
from jaxgrad.report import Cell, Role, write_report
from jaxgrad.report.all_tables import all_tables
from jaxgrad.report.comparisons import compare_all
from jaxgrad.report.figures import plan_figures
from jaxgrad.report.findings import findings
from jaxgrad.report.style import PROJECTION_STYLE, loss_words, style_of, styles_of

L, P = 5, 4
FEW = Resampling(num_resamples=100, num_permutations=100)
LENGTHS = [10 + k % 7 for k in range(24)]


def cell(setting, seed, *, loss=None, extra=None, **more):
    """24 examples, smaller with reasoning; `extra` adds a column of that name to the file."""
    rng = np.random.default_rng(seed)
    level = 0.1 if setting == "detailed" else 1.0
    rows = [
        example(
            e, level * rng.lognormal(size=(L, P)), tokens=tokens,
            stable_rank=1 + rng.random((L, P)), condition_number=9 * rng.random((L, P)), **more,
        )
        for e, tokens in enumerate(LENGTHS)
    ]  # fmt: skip
    options = {} if loss is None else {"loss": loss}
    read = results(rows, {"finished": True, "identity": identity(L, **options)})
    if extra is not None:
        read.matrices[extra] = rng.random(len(read.matrices))
    return Cell(Role("m", "AQuA", setting), Path("x"), example_set(read, f"m, {setting}"), None)


def report_of(*cells, **options):
    return compare_all(cells, title="t", resampling=FEW, **options)


def data_of(page, name):
    """A block of the page's data."""
    coded = re.search(rf'id="data-{name}">([^<]*)<', page.read_text("utf-8"))[1]
    return json.loads(gzip.decompress(base64.b64decode(coded)))


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_more_statistics_are_compared_drawn_and_on_the_page(tmp_path):
    cells = [cell("none", 0, extra="kurtosis"), cell("detailed", 1, extra="kurtosis")]
    more = ("condition_number", "kurtosis", "nuclear_norm")
    plain = write_report(cells, tmp_path / "plain", title="t", resampling=FEW)
    page = write_report(cells, tmp_path / "more", title="t", resampling=FEW, statistics=more)
    added = files(tmp_path / "more") - files(tmp_path / "plain")
    assert added == {
        *(f"tables/more_statistics{suffix}" for suffix in (".md", ".csv", ".tex")),
        *(f"figures/curves.m.aqua.{name}.{s}" for name in more[:2] for s in ("svg", "png")),
    }
    # Nothing of the default report is another.
    for name in (
        "tables/settings.csv",
        "tables/length.csv",
        "figures/curves.m.aqua.nuclear_norm.svg",
    ):
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    core = data_of(page, "core")
    assert list(core["statistics"])[-2:] == ["condition_number", "kurtosis"]
    assert core["statistics"]["condition_number"]["title"] == "Condition number"
    assert "condition_number" not in data_of(plain, "core")["statistics"]
    found = data_of(page, "examples-0")[3]["statistics"]["condition_number"]
    want = cells[0].examples.values("condition_number").value_ELP[3].mean(axis=0)
    np.testing.assert_allclose(found, want, rtol=5.1e-4)


def test_the_table_of_more_statistics_has_the_contrasts():
    cells = [cell("none", 0), cell("detailed", 1)]
    report = report_of(*cells, statistics=["stable_rank"])
    table = next(t for t in all_tables(report) if t.name == "more_statistics")
    contrast = report.comparisons[0].contrasts["stable_rank"]
    assert [row[3] for row in table.rows] == ["q", "k", "v", "o"]
    np.testing.assert_array_equal([row[4].value for row in table.rows], contrast.ratio_P.estimate)
    assert "Stable rank: (frobenius_norm / sigma_max)^2. Undefined when" in table.caption
    assert "more_statistics" not in {t.name for t in all_tables(report_of(*cells))}


def test_a_statistic_that_some_run_lacks_is_missing_there_alone():
    report = report_of(
        cell("none", 0, extra="kurtosis"), cell("detailed", 1), statistics=["kurtosis"]
    )
    assert "kurtosis" in report.curves[0].descriptions
    assert "No statistic 'kurtosis'" in report.curves[1].missing["kurtosis"]
    limits = findings(report)[-1]
    assert any(s.startswith("Kurtosis is missing in 1 of 2 runs") for s in limits.sentences)


def test_a_statistic_that_no_run_has_is_refused_at_once(tmp_path):
    with pytest.raises(
        UserError, match=r"No statistic 'norm': there are nuclear_norm, .*stable_rank"
    ):
        write_report([cell("none", 0)], tmp_path / "out", title="t", statistics=["norm"])
    assert not (tmp_path / "out").exists()


def test_the_default_statistics_are_those_of_the_report():
    assert tuple(report_of(cell("none", 0)).statistics) == DEFAULT_STATISTICS


def texts(report):
    """All that a report says in words, but the page."""
    tables, figures = all_tables(report), plan_figures(report)
    return "\n".join(
        [
            *(f"{f.lead} {' '.join(f.sentences)}" for f in findings(report)),
            *(t.caption + " ".join(f"{c.group} {c.name}" for c in t.columns) for t in tables),
            *(f.caption for f in figures),
            *(s.sentence for s in report.statistics.values()),
        ]
    )


def test_the_words_for_the_mean_loss():
    said = texts(report_of(cell("none", 0), cell("detailed", 1)))
    for words in (
        "in nats per response token", "mean of the loss ratio", "Mean loss: as measured",
        "by the sum of the loss in place of its mean", "times the number of response tokens",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("loss", ["response_sum", "unheard_of"])
def test_a_report_on_another_loss_does_not_speak_of_the_mean(tmp_path, loss):
    cells = [cell("none", 0, loss=loss), cell("detailed", 1, loss=loss)]
    report = report_of(*cells)
    assert report.comparisons[0].summed is None
    said = texts(report)
    for words in ("per response token", "mean of the loss", "Mean loss", "in place of its mean"):
        assert words not in said
    assert f"gradient of the {loss_words(loss).phrase}" in said
    table = next(t for t in all_tables(report) if t.name == "length")
    at = [c.group for c in table.columns].index("sum of the loss")
    assert all(np.isnan(row[at].value) and row[at + 1] == "not known" for row in table.rows)
    page = write_report(cells, tmp_path / "out", title="t", resampling=FEW)
    html = page.read_text("utf-8")
    assert f"the gradient of the {loss_words(loss).phrase} by the weight" in html
    assert data_of(page, "core")["loss"] == {
        "phrase": loss_words(loss).phrase, "unit": loss_words(loss).unit,
    }  # fmt: skip
    missing = report.comparisons[0].missing.get("sum_loss_norm", "")
    assert ("of the loss unheard_of" in missing) == (loss == "unheard_of")


def test_runs_of_two_losses_make_no_report(tmp_path):
    cells = [cell("none", 0), cell("detailed", 1, loss="response_sum")]
    with pytest.raises(
        UserError, match="different losses: m, none of response_mean and m, detailed"
    ):
        write_report(cells, tmp_path / "out", title="t", resampling=FEW)
    assert not (tmp_path / "out").exists()


def test_a_report_on_experts(tmp_path):
    words = ("up.0", "up.1", "up.12")
    cells = []
    for seed, setting in enumerate(("none", "detailed")):
        rng = np.random.default_rng(seed)
        rows = [
            example(
                e, rng.lognormal(size=(L, 3)), projections=("up",) * 3, expert=[[12, 0, 1]] * L,
            )
            for e in range(22)
        ]  # fmt: skip
        read = results(rows, {"finished": True, "identity": identity(L)})
        cells.append(Cell(Role("m", "", setting), "x", example_set(read, setting), None))
        assert cells[-1].examples.projections == words
    page = write_report(cells, tmp_path / "out", title="t", resampling=FEW)
    core = data_of(page, "core")
    assert {name: look["title"] for name, look in core["projections"].items()} == {
        "up.0": "up 0", "up.1": "up 1", "up.12": "up 12",
    }  # fmt: skip
    head = (tmp_path / "out/tables/mad.csv").read_text("utf-8").splitlines()[0]
    assert all(f"MAD, all layers {word}" in head for word in words)


def test_styles_of_experts_and_parts():
    assert [*styles_of(["up.10", "o", "up.2", "q.lora_B", "up", "q", "q.lora_A", "q"])] == [
        "q", "q.lora_A", "q.lora_B", "o", "up", "up.2", "up.10",
    ]  # fmt: skip
    assert styles_of(PROJECTION_NAMES[:-1]) == dict(PROJECTION_STYLE)
    two, three = style_of("up.2"), style_of("up.3")
    assert two.colour == three.colour == PROJECTION_STYLE["up"].colour
    assert two != three and two == style_of("up.2")
