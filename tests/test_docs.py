"""The pages say what the code says, their links lead somewhere, and their Python can be read."""

import ast
import csv
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "BUILD_NOTES.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
LONGEST_README = 150


def page(path):
    return path.relative_to(ROOT).as_posix()


def anchors(path):
    """What a link may name in a page: its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_follows_from_the_code_is_up_to_date():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= LONGEST_README


def test_every_page_is_named_in_readme_or_in_the_build_notes():
    text = (ROOT / "README.md").read_text("utf-8") + (ROOT / "BUILD_NOTES.md").read_text("utf-8")
    named = set(LINK.findall(text))
    assert [p for p in map(page, PAGES) if p.startswith("docs/") and p not in named] == []


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text("utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_python_can_be_parsed(path):
    for snippet in re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S):
        ast.parse(snippet)


def test_the_ledger_is_a_table():
    with (ROOT / "docs" / "ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["date", "commit", "device", "what", "prediction", "measured"]
    for row in rows:
        assert None not in row and all(
            row[name] for name in ("commit", "device", "what", "measured")
        )
        datetime.date.fromisoformat(row["date"])
