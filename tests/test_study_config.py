"""A study's file: every key arrives, what is not understood is named; the studies that are shipped."""

from pathlib import Path

import pytest

from jaxgrad.analysis import Resampling
from jaxgrad.data.examples import Fields
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.study import read_study

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
MINIMAL = """
title = "T"
[[models]]
name = "tiny"
[[data]]
name = "AQuA"
correct = {none = "none.json"}
"""


def read(folder, text):
    path = folder / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_defaults(tmp_path):
    config = read(tmp_path, MINIMAL)
    assert (config.title, config.about, config.start, config.limit) == ("T", "", 0, None)
    assert config.options == AnalyzeOptions() and config.fields == Fields()
    assert config.resampling == Resampling() and config.model_pairs() == []
    assert config.model_path(config.models[0]) is None
    assert config.data_path("none.json") == tmp_path / "none.json"


def test_every_key_arrives(tmp_path):
    text = MINIMAL.replace("[[models]]", "[analyze]\n#\n[report]\n#R\n[[models]]", 1)
    text = text.replace(
        "#\n",
        'protocol = "clean"\nchat = "no"\nmax_length = 7\nparameters = "mlp"\nmethod = "dense"\n'
        'spectrum = true\nextremes = true\nsimilarity = true\nlayerwise = "no"\n'
        'batch_tokens = 3\ndtype = "float64"\n'
        'precision = "high"\nloss = "response_sum"\ndate = "2024-02-29"\n'
        'start = 2\nlimit = 5\ninstruction_field = "a"\ninput_field = "b"\noutput_field = "c"\n',
        1,
    ).replace("#R\n", "level = 0.9\nnum_resamples = 300\nnum_permutations = 900\nseed = 4\n")
    config = read(tmp_path, text)
    expected = AnalyzeOptions(
        protocol="clean",
        chat="no",
        max_length=7,
        parameters="mlp",
        method="dense",
        spectrum=True,
        extremes=True,
        similarity=True,
        layerwise="no",
        batch_tokens=3,
        dtype="float64",
        precision="high",
        date="2024-02-29",
        loss="response_sum",
    )
    assert config.options == expected
    assert (config.start, config.limit, config.fields) == (2, 5, Fields("a", "b", "c"))
    assert config.resampling == Resampling(0.9, 300, 900, 4)
    assert read_study(config.path, limit=1).limit == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('title = "T"', "", "'title' is missing"),
        ('title = "T"', "title = 3", "title = 3 is not text"),
        ('title = "T"', 'title = " "', "title is empty"),
        ('title = "T"', 'title = "T"\nabuot = "x"', "'abuot' is not a key here"),
        ('title = "T"', 'title = "T', "is not TOML"),
        ('title = "T"', "title = " + "[" * 5000, "is not TOML"),
        ('title = "T"', "title = 1" + "0" * 5000, "is not TOML"),
        ("[[models]]", '[analyze]\nmodel_path = "x"\n[[models]]', "'model_path' is not a key"),
        ("[[models]]", "[analyze]\nmax_length = true\n[[models]]", "not a whole number"),
        ("[[models]]", '[analyze]\nmax_length = "1"\n[[models]]', "not a whole number"),
        ("[[models]]", "[analyze]\nlimit = 0\n[[models]]", "limit = 0 is too small"),
        ("[[models]]", "[analyze]\nstart = -1\n[[models]]", "start = -1 is too small"),
        ("[[models]]", '[analyze]\nprotocol = "papers"\n[[models]]', "use one of paper, clean"),
        ("[[models]]", '[analyze]\ndtype = "int8"\n[[models]]', "float32, bfloat16, float64"),
        (
            "[[models]]",
            '[analyze]\nloss = "mean"\n[[models]]',
            "[analyze]: loss = 'mean' is unknown: use one of response_mean, response_sum",
        ),
        ("[[models]]", '[analyze]\ndate = "2023-02-29"\n[[models]]', "2023-02-29"),
        ("[[models]]", '[analyze]\nsimilarity = "yes"\n[[models]]', "not true or false"),
        ("[[models]]", "analyze = 1\n[[models]]", "'analyze' is not a table"),
        ("[[models]]", "[report]\nlevel = 95\n[[models]]", "coverage between 0 and 1"),
        ("[[models]]", "[report]\nnum_resamples = 9\n[[models]]", "give 100 or more"),
        ("[[models]]", "[report]\nnum_permutations = 0\n[[models]]", "give 100 or more"),
        ("[[models]]", "[report]\nseed = -1\n[[models]]", "seed = -1 is too small"),
        ('[[models]]\nname = "tiny"', "", "there is no [[models]]"),
        ('[[models]]\nname = "tiny"', "models = []", "there is no [[models]]"),
        ('[[models]]\nname = "tiny"', "models = [1]", "not a list of tables"),
        ('[[models]]\nname = "tiny"', '[models]\nname = "tiny"', "not a list of tables"),
        ('name = "tiny"', 'name = "tiny"\nrole = "tuned"', "use one of base, instruct"),
        ('name = "tiny"', 'name = "tiny"\npair = "p"', "pair needs a role"),
        ('name = "tiny"', 'name = "tiny"\nrole = "base"\npair = "p"', "alone in the pair 'p'"),
        ('name = "tiny"', 'name = "..."', "no letter or digit"),
        ('name = "tiny"', 'name = "tiny"\n[[models]]\nname = "Tiny"', "the same directory 'tiny'"),
        ('name = "AQuA"', 'name = "AQuA"\nkind = 1', "kind = 1 is not text"),
        ('correct = {none = "none.json"}', "", "correct names no file"),
        ('correct = {none = "none.json"}', "correct = {}", "correct names no file"),
        ('correct = {none = "none.json"}', "correct = {none = 1}", "none = 1 is not text"),
        ('correct = {none = "none.json"}', 'correct = "f"', "'correct' is not a table"),
        ('{none = "none.json"}', '{none = "a"}\nirrelevant = {}', "irrelevant names no file"),
        ('{none = "none.json"}', '{none = "a"}\nwrong = {}', "'wrong' is not a key here"),
        ('{none = "none.json"}', '{"a b" = "a", "a-b" = "b"}', "the same directory"),
        (
            '{none = "none.json"}',
            '{none = "a"}\n[[data]]\nname = "AQuA"\ncorrect = {none = "b"}',
            "two data sets are called 'AQuA'",
        ),
    ],
)
def test_what_is_not_understood_is_named_in_one_line(tmp_path, old, new, told):
    assert MINIMAL.count(old) == 1
    with pytest.raises(UserError) as caught:
        read(tmp_path, MINIMAL.replace(old, new))
    message = str(caught.value)
    assert told in message and str(tmp_path / "study.toml") in message and "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_study(tmp_path / "no.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_studies(path, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXGRAD_SHARED", str(tmp_path))
    config = read_study(path)
    command = f"--config=configs/{path.name}"
    header = path.read_text().split("\n\n")[0]
    assert command in header and "device time" in header and "what to expect" in header
    stems = [role.stem for role in config.roles(config.models[0])]
    assert len(set(stems)) == len(stems)
    if path.stem.startswith("paper"):
        assert len(config.models) == 10 and len(config.model_pairs()) == 5
        assert config.limit == 500


def test_the_demo_has_its_data_and_the_reproduction_its_cells():
    demo = read_study(ROOT / "configs" / "demo.toml")
    files = [demo.data_path(file.path) for file in demo.roles(demo.models[0]).values()]
    assert len(files) == 6 and all(path.is_file() for path in files)
    roles = list(read_study(ROOT / "configs" / "reproduction_smollm2.toml").roles(demo.models[0]))
    assert len(roles) == 3 * 3 * 2 + 2 * 2 + 2 * 2
