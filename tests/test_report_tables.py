"""Tables of a report: numbers with limits, and their forms."""

import csv
import io
import math

import pytest

from jaxgrad.report.tables import (
    NOTHING,
    Column,
    Number,
    Table,
    as_csv,
    as_latex,
    as_markdown,
    compact,
    written,
)  # fmt: skip

HOSTILE = "a|b_c <i> & 50% $x$ [l](u) #1\n{z}"


def table(*rows, columns=(Column("set"), Column("q", "MAD"), Column("k", "MAD"))):
    return Table("mad", "MAD of a_b", "All layers.", columns, rows)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.14951, "number", "1.15"),
        (2.0, "number", "2.00"),
        (0.0, "number", "0.00"),
        (-12.345, "number", "-12.3"),
        (123.4, "number", "123"),
        (1234.6, "number", "1235"),
        (1234567.0, "number", "1.23e+06"),
        (999.7, "number", "1000"),
        (0.000123, "number", "1.23e-04"),
        (math.nan, "number", NOTHING),
        (7.0, "count", "7"),
        (0.456, "percent", "45.6 %"),
        (0.0123, "p", "0.012"),
        (0.0001, "p", "0.0001"),
        (math.nan, "p", NOTHING),
    ],
)
def test_a_number_is_written_in_its_form(value, form, text):
    assert written(value, form) == text


def test_limits_stand_behind_a_number_and_only_where_there_are_some():
    assert Number(1.0, 0.5, 1.5).text == "1.00 [0.500, 1.50]"
    assert Number(1.0, math.nan, 1.5).text == "1.00"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="another number"):
        table(("AQuA", Number(1.0)))


def test_csv_has_full_precision_and_limits_in_columns_of_their_own():
    text = as_csv(
        table(("A,B", Number(1 / 3, 0.1, 0.5), Number(math.nan)), ("C", Number(2.0), Number(3.0)))
    )
    head, *rows = csv.reader(io.StringIO(text))
    assert head == ["set", "MAD q", "MAD q low", "MAD q high", "MAD k"]
    assert rows[0] == ["A,B", repr(1 / 3), "0.1", "0.5", ""]
    assert rows[1] == ["C", "2.0", "", "", "3.0"]


def test_markdown_escapes_what_would_be_markup():
    lines = as_markdown(table((HOSTILE, Number(1.0, 0.5, 1.5), Number(2.0)))).splitlines()
    head, rule, row = lines[2:5]
    assert head == "| set | MAD q | MAD k |"
    assert rule == "|---|---:|---:|"
    assert row.startswith(r"| a\|b\_c \<i\> & 50% $x$ \[l\](u) #1 {z} | 1.00 [0.500, 1.50] |")


def test_latex_has_booktabs_rules_groups_and_no_active_character_of_the_data():
    text = as_latex(table((HOSTILE, Number(1.0, 0.5, 1.5), Number(math.nan))))
    assert r"\multicolumn{2}{c}{MAD} \\" in text
    assert r"\cmidrule(lr){2-3}" in text
    assert r" & \multicolumn" in text  # the first column has no group
    assert r"1.00\,{\scriptsize [0.500, 1.50]} & -- \\" in text
    assert r"a\textbar{}b\_c <i> \& 50\% \$x\$ [l](u) \#1 \{z\}" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:mad}"):
        assert text.count(rule) == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [line.count(" & ") for line in rows] == [1, 2, 2]


def test_the_column_of_models_is_left_out_for_the_eye_where_there_is_one_model():
    columns = (Column("model"), Column("q", "MAD"))
    one = table(("m", Number(1.0)), ("m", Number(2.0)), columns=columns)
    two = table(("m", Number(1.0)), ("n", Number(2.0)), columns=columns)
    assert compact(one).columns == (Column("q", "MAD"),)
    assert compact(one).rows == ((Number(1.0),), (Number(2.0),))
    assert compact(two) == two
    assert "model" not in as_markdown(one) + as_latex(one)
    assert as_csv(one).startswith("model,MAD q\nm,1.0\n")  # for programs it stays
