"""docs/extending.md: its changes are applied to a copy of the package, and its snippets run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
# Section -> how many files it may take, its test included.
MOST_FILES = {
    "A statistic": 3,
    "A loss": 3,
    "A model family": 2,
    "A score": 2,
    "A data format": 2,
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def sections():
    """Title -> [(language, text of a block, its line in the page)]."""
    text = PAGE.read_text("utf-8")
    found = {}
    for part in re.finditer(r"^## (.*)\n(?:(?!## ).*\n?)*", text, re.MULTILINE):
        blocks = FENCE.finditer(part[0])
        found[part[1]] = [
            (block[1], block[2], text[: part.start() + block.start(2)].count("\n"))
            for block in blocks
        ]
    return found


def changes(blocks):
    """(file, old text, new text) of the diffs."""
    for language, text, _ in blocks:
        if language != "diff":
            continue
        header, hunks = text.split("\n", 1)
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-" or line == "\n" for line in lines)
            old, new = ("".join(x[1:] or x for x in lines if x[0] != other) for other in "+-")
            yield header.removeprefix("--- "), old, new


def test_the_page_has_a_section_for_each():
    assert list(sections()) == list(MOST_FILES)


@pytest.mark.parametrize("title", MOST_FILES)
def test_it_takes_no_more_files_than_the_page_says(title):
    files = {file for file, _, _ in changes(sections()[title])}
    # The snippet is a test file of its own, unless a change is one.
    count = len(files) + (not any(file.startswith("tests/") for file in files))
    assert count <= MOST_FILES[title]
    (stated,) = re.findall(rf"^\| \[{title.lower()}\]\(.*?\).*? \| (\d) \|", PAGE.read_text(), re.M)
    assert count == int(stated)


def test_the_snippets_run_where_the_changes_are_made(tmp_path):
    without_cache = shutil.ignore_patterns("__pycache__")
    for folder in ("jaxgrad", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without_cache)
    text = PAGE.read_text("utf-8")
    # Empty lines between the snippets, so that a traceback gives the lines of the page.
    lines = [""] * text.count("\n")
    for title, blocks in sections().items():
        for file, old, new in changes(blocks):
            content = (tmp_path / file).read_text("utf-8")
            assert content.count(old) == 1, f"{title}: not once in {file}:\n{old}"
            (tmp_path / file).write_text(content.replace(old, new), "utf-8")
        snippets = [(code, line) for language, code, line in blocks if language == "python"]
        assert snippets, title
        for code, line in snippets:
            lines[line : line + code.count("\n")] = code.splitlines()
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([*lines, "import jaxgrad", "print(jaxgrad.__file__)"]), "utf-8")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"the lines are those of docs/extending.md\n{done.stderr}"
    assert Path(done.stdout.split()[-1]).is_relative_to(tmp_path)
