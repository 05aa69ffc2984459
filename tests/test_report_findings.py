"""Findings in words: their figures are the tables', their outcome the controls'."""

import numpy as np
import pytest
from analysis_runs import set_of

from jaxgrad.analysis import Resampling
from jaxgrad.report.all_tables import all_tables
from jaxgrad.report.cells import Cell, Role
from jaxgrad.report.comparisons import compare_all
from jaxgrad.report.findings import findings
from jaxgrad.report.tables import as_csv, as_latex, as_markdown

FEW = Resampling(num_resamples=200, num_permutations=200)
LENGTHS = [10 + k % 7 for k in range(30)]
LEVELS = {"none": 4.0, "simplified": 3.0, "detailed": 2.0}


def cell(role, level, *, tokens=LENGTHS, seed=0, **lists):
    rng = np.random.default_rng(seed)
    value_ELP = level * rng.uniform(0.95, 1.05, (len(tokens), 5, 2))
    return Cell(role, "", set_of(value_ELP, role.title, tokens=tokens, **lists), None)


@pytest.fixture(scope="module")
def study():
    cells = []
    for setting, level in LEVELS.items():
        correct = [f"{setting} {k}" for k in range(30)]
        # A third of the shuffled answers are right by chance.
        shuffled = [text if k % 3 == 0 else f"not {text}" for k, text in enumerate(correct)]
        cells += [
            cell(Role("m", "AQuA", setting), level, response=correct),
            cell(Role("m", "AQuA", setting, "irrelevant"), 2 * level, response=shuffled),
        ]
    cells.append(cell(Role("m-Instruct", "AQuA", "none"), 4.0))
    return compare_all(
        cells,
        title="A study",
        model_pairs=[("m", "m-Instruct")],
        unavailable={"ECQA, none": "no such file"},
        resampling=FEW,
    )


def test_comparisons_are_those_of_one_difference_in_role(study):
    assert [(c.kind, c.title) for c in study.comparisons] == [
        ("response", "AQuA, none: correct to irrelevant"),
        ("setting", "AQuA: none to simplified"),
        ("setting", "AQuA: none to detailed"),
        ("model", "AQuA, none: m to m-Instruct"),
        ("setting", "AQuA: none to simplified (irrelevant)"),
        ("setting", "AQuA: none to detailed (irrelevant)"),
        ("response", "AQuA, simplified: correct to irrelevant"),
        ("setting", "AQuA: simplified to detailed"),
        ("setting", "AQuA: simplified to detailed (irrelevant)"),
        ("response", "AQuA, detailed: correct to irrelevant"),
    ]


def test_each_finding_is_there_with_its_outcome(study):
    found = {finding.heading: finding for finding in findings(study)}
    assert list(found) == [
        "m, AQuA: none against detailed",
        "m, AQuA: correct against irrelevant",
        "AQuA, none: base against instruction-tuned",
        "What limits all of it",
    ]
    first, second, _, limits = found.values()
    assert (first.outcome, second.outcome) == ("stands", "stands")
    assert limits.sentences[-1] == "Not there: ECQA, none: no such file"


def test_the_figures_are_those_of_the_sets(study):
    first, second = findings(study)[:2]
    none, detailed = (
        next(c for c in study.cells if c.role == Role("m", "AQuA", setting)).examples
        for setting in ("none", "detailed")
    )
    means = [examples.values().value_ELP.mean(axis=(0, 1)) for examples in (none, detailed)]
    ratio = means[1] / means[0]
    assert f"is q {ratio[0]:.3f}, k {ratio[1]:.3f} times that of none" in first.sentences[0]
    assert "with a chance of 1.00" in first.sentences[0]
    assert "stands in all" in first.sentences[-1]
    assert all("In 10 of 30 pairs" in sentence for sentence in second.sentences)
    # Equal lengths in both sets: every example has a partner, and every control decides.
    assert all("by 30 pairs matched on response tokens" in s for s in second.sentences)
    assert "30 pairs leak the correct answer. Without them, 6 of 6 contrasts stand." in second.lead
    assert second.lead.endswith(
        "Controlled for length, it stands with the summed loss; it stands among examples matched on "
        "length; it stands in the regression on length."
    )
    # Of twice the norms, leaked or not: RD is 1 within the noise, which is the same in both.
    assert "by q 100.0 %, k 100.0 %" in second.sentences[0]


def test_a_contrast_that_is_of_length_alone_falls():
    short, long = [4 + k % 2 for k in range(30)], [100 + k % 3 for k in range(30)]
    cells = [
        cell(Role("m", "", "none"), 5.0, tokens=short),
        cell(Role("m", "", "detailed"), 1.0, tokens=long),
    ]
    first = findings(compare_all(cells, title="", resampling=FEW))[0]
    assert first.outcome == "falls"
    assert any("turns round in all" in sentence for sentence in first.sentences)
    assert any("no two match" in sentence for sentence in first.sentences)
    assert any("decides nothing" in sentence for sentence in first.sentences)


def test_one_run_and_one_example_are_limits_that_are_said():
    single = cell(Role("m", "", "none"), 1.0, tokens=[5])
    study = compare_all([single], title="", resampling=FEW)
    (limits,) = findings(study)
    assert any("fewer than 20 examples" in sentence for sentence in limits.sentences)
    table = next(t for t in all_tables(study) if t.name == "mad")
    assert all("[" not in value.text for value in table.rows[0][4:])


def test_every_table_has_every_form(study):
    tables = all_tables(study)
    assert [table.name for table in tables] == [
        "examples", "mad_aqua", "mad_segments_aqua", "statistics", "settings", "length", "responses",
        "length_responses", "models",
    ]  # fmt: skip
    for table in tables:
        lines = as_csv(table).splitlines()
        assert len(lines) == 1 + len(table.rows)
        assert as_markdown(table).count("\n|") == 2 + len(table.rows)
        assert as_latex(table).count(r" \\") == len(table.rows) + 1 + any(
            column.group for column in table.columns
        )


def test_p_is_adjusted_for_the_number_of_rows(study):
    table = next(t for t in all_tables(study) if t.name == "responses")
    p = np.array([row[-2].value for row in table.rows])
    adjusted = np.array([row[-1].value for row in table.rows])
    # Benjamini & Hochberg by hand: the running minimum from the largest of p n / rank.
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    expected = np.minimum.accumulate(scaled[::-1])[::-1]
    np.testing.assert_allclose(adjusted[order], np.minimum(expected, 1), rtol=1e-12)


def test_responses_that_are_not_told_apart_have_nothing_to_stand():
    cells = [
        cell(Role("m", "", "none", response), 1.0, seed=seed)
        for seed, response in enumerate(("correct", "irrelevant"))
    ]
    first = findings(compare_all(cells, title="", resampling=FEW))[0]
    assert first.outcome == "unclear"
    assert "in none of them" in first.lead and "Of these contrasts" not in first.lead
