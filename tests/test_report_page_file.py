"""The report's page as a file: what stands in it without a script, its policy, its limit of bytes."""

import base64
import gzip
import re

import numpy as np
import pytest
from page_studies import FINDINGS, TABLE, cell, role, small_study

from jaxgrad.report.page import write_page
from jaxgrad.report.page_data import Block, curve, fitting, interval_curve, pack
from jaxgrad.report.page_examples import evenly


@pytest.fixture(scope="module")
def small_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(small_study(), [TABLE], FINDINGS, path)
    return path


def test_a_packed_curve_keeps_four_digits_of_its_smallest_value():
    values = np.array([0.0123456, -123.456, 0.0, np.nan])
    exponent, integers = curve(values)
    # 0.0123456 has its fourth digit at 1e-5.
    assert (exponent, integers) == (-5, [1235, -12345600, 0, None])


def test_limits_are_distances_in_the_curves_unit():
    packed = interval_curve(np.array([2.0, 4.0]), np.array([1.5, np.nan]), np.array([2.25, np.nan]))
    assert packed == [-3, [2000, 4000], [500, None], [250, None]]
    nothing = np.full(2, np.nan)
    assert interval_curve(np.array([2.0, 4.0]), nothing, nothing) == [-3, [2000, 4000]]


def test_blocks_that_do_not_fit_are_named():
    small, large = Block("a", "x" * 10, "a"), Block("b", "x" * 1000, "b")
    assert fitting([large, small], 200) == ([small], [large])


def test_a_choice_of_examples_has_both_extremes():
    examples = cell(role(), examples=30).examples
    norm_E = examples.column_ELP["nuclear_norm"].mean(axis=(1, 2))
    chosen = evenly(examples, 5)
    assert len(set(chosen)) == 5
    assert {int(norm_E.argmin()), int(norm_E.argmax())} <= set(chosen)
    assert evenly(examples, 30) == list(range(30))


def test_the_same_content_gives_the_same_text():
    assert pack("σ") == pack("σ")
    assert gzip.decompress(base64.b64decode(pack("σ"))).decode() == "σ"


def test_the_tables_and_findings_stand_in_the_html(small_page):
    html = small_page.read_text("utf-8")
    body = html[: html.index('<script type="application/gzip"')]
    for text in ("Norms fall", "V: 0.21", "MAD of the nuclear norm", "9.00, 11.0", "✗ falls"):
        assert text in body
    assert "GSM8K, detailed" in body and "there is no such file" in body
    assert "skipped: prompt fills max_length" in body
    assert "commit 0123456789ab" in body and "protocol paper" in body
    assert "/secret" not in html


def test_the_policy_allows_nothing_but_the_two_scripts(small_page):
    html = small_page.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#39;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-\S{44}' 'sha256-\S{44}'", rules["script-src"])
    assert "http" not in policy
    # Nothing that would be fetched: every address is a fragment or data.
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html[: html.index("<script>")])
    assert all(address.startswith(("#", "data:")) for address in addresses)


def test_a_page_says_what_it_leaves_out(tmp_path, monkeypatch):
    limit = 2_100_000
    monkeypatch.setattr("jaxgrad.report.page.LIMIT", limit)
    monkeypatch.setattr("jaxgrad.report.page.TABLES_LIMIT", 300)
    size = write_page(small_study(examples=40), [TABLE], [], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert size.num_bytes == len(html.encode()) < limit
    assert "the table “MAD of the nuclear norm”" in html
    assert len(size.left_out) > 1
    assert all(what in html for what in size.left_out)
    assert size.all_examples == 240 and size.examples < 240
    if size.examples:
        assert f"{size.examples} of 240 examples are embedded" in html
    else:
        assert "The examples do not fit" in html
