"""Paths as users write them: ~, environment variables, commas."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrad.checkpoints.places import find_local_model
from jaxgrad.data.read import read_examples
from jaxgrad.errors import UserError
from jaxgrad.paths import expanded, split_paths
from jaxgrad.results.urls import local_path, path_below

ROOT = Path(__file__).parents[1]
RUN = ROOT / "tests" / "older_runs" / "jsonl"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "my runs")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_home_and_variables_are_expanded(home):
    assert expanded("~/a") == f"{home}/a"
    assert expanded("~") == str(home)
    assert expanded("$RUNS/a") == expanded("${RUNS}/a") == "my runs/a"
    assert expanded("~/$RUNS/${RUNS}s") == f"{home}/my runs/my runss"
    assert expanded("gs://$RUNS/x") == "gs://my runs/x"


@pytest.mark.parametrize(
    "text", ["a/b.json", "a~b", "a/~b", "5$", "a,b", "", "-", "/x y/z", "$1", "~\0"]
)
def test_other_texts_stay(home, text):
    assert expanded(text) == text


def test_a_name_that_exists_as_it_is_written_stays(home):
    for name in ("~x", "$NOWHERE", "a$RUNS"):
        (home / name).touch()
        assert expanded(name) == name


@pytest.mark.parametrize("text", ["$NOWHERE/a", "x/${NOWHERE}", "~/$NOWHERE"])
def test_a_variable_that_is_not_set_is_named(home, text):
    with pytest.raises(UserError, match="environment variable NOWHERE is not set"):
        expanded(text)


def test_the_python_interface_expands_too(home):
    assert local_path("~/run1") == local_path(Path("~/run1")) == home / "run1"
    assert path_below("~/runs", "a") == f"{home}/runs/a"
    (home / "d.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert read_examples("~/d.json").path == home / "d.json"
    (home / "model").mkdir()
    assert find_local_model("~/model").path == home / "model"


def test_paths_are_separated_by_commas(home):
    assert split_paths("a.json") == ["a.json"]
    assert split_paths("a.json,~/b.json") == ["a.json", "~/b.json"]
    assert split_paths(r"a\,b.json,c") == ["a,b.json", "c"]
    assert split_paths(r"\,") == [","]


def test_a_file_whose_name_has_a_comma_is_one_file(home):
    (home / "a,b.json").touch()
    assert split_paths("a,b.json") == split_paths(r"a\,b.json") == ["a,b.json"]
    assert split_paths("~/a,b.json") == ["~/a,b.json"]
    (home / "a").touch()
    assert split_paths("a,b.json") == ["a,b.json"]
    (home / "b.json").touch()
    with pytest.raises(
        UserError, match=r"a,b.json is a file, and a and b.json are files: write \\,"
    ):
        split_paths("a,b.json")
    assert split_paths(r"a\,b.json") == ["a,b.json"]


def test_a_command_takes_them(home):
    """The shell expands neither ~ nor a variable in `--run_dir='~/$RUNS'`; no folder is named ~."""
    shutil.copytree(RUN, home / "my runs")
    command = [sys.executable, str(ROOT / "bin" / "export")]
    done = subprocess.run(
        [*command, "--run_dir=~/$RUNS", "--output_path=~/authors.jsonl"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (home / "authors.jsonl").read_text().startswith("{")
    assert sorted(path.name for path in home.iterdir()) == ["authors.jsonl", "my runs"]
    done = subprocess.run(
        [*command, "--run_dir=~/$NOWHERE", "--output_path=x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "variable NOWHERE is not set" in done.stderr
