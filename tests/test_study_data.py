"""What a study, a run's directory and the command line make of the records' kind."""

import json

import pytest

from jaxgrad.data.examples import Fields
from jaxgrad.data.read import read_examples
from jaxgrad.errors import OutputError, UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results import layout
from jaxgrad.results.storage import open_storage
from jaxgrad.runs.asked import ask_run, run_directories
from jaxgrad.study import read_study
from jaxgrad.study.plan import plan_study

PREFERENCES = [{"prompt": "q", "chosen": "yes", "rejected": "no"}]
STUDY = """\
title = "T"
[[models]]
name = "m"
[[data]]
name = "pairs"
data_format = "preference"
correct = {dpo = {file = "pairs.json", response = "chosen"}}
irrelevant = {dpo = {file = "pairs.json", response = "rejected"}}
[[data]]
name = "hub"
correct = {none = "hf:org/name:train"}
"""


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PREFERENCES))
    return path


def study(tmp_path, text=STUDY):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_a_study_measures_both_responses(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = study(tmp_path)
    assert config.data_path("hf:org/name:train") == "hf:org/name:train"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)  # so that the hub's set is refused at once
    chosen, rejected, hub = plan_study(config, tmp_path / "out").cells
    assert [e.response for e in chosen.data.examples] == ["yes"]
    assert [e.response for e in rejected.data.examples] == ["no"]
    assert (chosen.file, rejected.file) == ("pairs.json (chosen)", "pairs.json (rejected)")
    assert hub.data is None and hub.reason.startswith("--data_path=hf:org/name:train: a directory")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"preference"', '"dpo"', "data_format = 'dpo' is unknown: use one of auto, alpaca"),
        ('"rejected"', '"worse"', "response = 'worse' is unknown: use one of chosen, rejected"),
        ('file = "pairs.json", response = "rejected"', 'response = "rejected"', "'file' is missin"),
        ('response = "rejected"', 'kind = "rejected"', "'kind' is not a key here"),
    ],
)
def test_wrong_values_of_a_study(tmp_path, old, new, told):
    assert old in STUDY
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        study(tmp_path, STUDY.replace(old, new))


def identity_of(data, tmp_path):
    return ask_run(data, tmp_path / "out", AnalyzeOptions(), start=0, limit=None).identity


def test_a_directory_holds_the_run_of_one_response(tmp_path, pairs):
    storage = open_storage(tmp_path / "out")
    chosen, rejected = (
        identity_of(read_examples(pairs, response=name), tmp_path)
        for name in ("chosen", "rejected")
    )
    layout.refuse_other_run(storage, chosen, chosen, partial=True)
    with pytest.raises(OutputError, match=r'data\.response is "?chosen"? there, "?rejected"? here'):
        layout.refuse_other_run(storage, chosen, rejected, partial=True)


def test_a_run_of_the_first_kinds_keeps_its_identity(tmp_path):
    """One that was finished before the kinds were recorded is that of today, and of no other kind."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "a", "text": "t"}]))
    storage = open_storage(tmp_path / "out")
    today = identity_of(read_examples(path), tmp_path)
    assert set(today["data"]) == {"start", "limit", "sha256"}
    assert today == identity_of(read_examples(path, data_format="alpaca"), tmp_path)
    as_text = identity_of(read_examples(path, data_format="text"), tmp_path)
    for one, other in ((today, as_text), (as_text, today)):
        with pytest.raises(OutputError, match=r"data\.kind is"):
            layout.refuse_other_run(storage, one, other, partial=True)


def test_a_run_by_other_fields_is_another_run(tmp_path):
    """The file's bytes are the same, and a finished run is recognized before anything is tokenized."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "a", "answer": "b"}]))
    storage = open_storage(tmp_path / "out")
    usual = identity_of(read_examples(path), tmp_path)
    other = identity_of(read_examples(path, fields=Fields(output="answer")), tmp_path)
    layout.refuse_other_run(storage, other, other, partial=True)
    for one, two in ((usual, other), (other, usual)):
        with pytest.raises(OutputError, match=r"data\.fields is .*instruction, input, answer"):
            layout.refuse_other_run(storage, one, two, partial=True)


def test_runs_of_several_sets_have_directories_of_their_own(tmp_path):
    paths = ["hf:org/name-1.5:train", "hf:org/name-1.5:test", "a/pairs.jsonl.gz", "b/set.v2"]
    names = ["name-1.5-train", "name-1.5-test", "pairs", "set"]
    found = run_directories(paths, tmp_path)
    assert found == {p: str(tmp_path / name) for p, name in zip(paths, names, strict=True)}
