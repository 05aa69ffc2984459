"""--revision: which commit of a hub id is read, and what run.json says of it. Offline."""

import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from checkpoint_files import (
    K_PROJ,
    assert_same_parameters,
    files_of,
    load,
    weights_with,
    write_gguf,
    write_json,
    write_model,
)

import jaxgrad
from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.errors import UserError
from jaxgrad.options import ModelOptions
from jaxgrad.study import plan_study, read_study

OLD, NEW = "a" * 40, "b" * 40
CHANGED = {K_PROJ: np.zeros_like(files_of().weights[K_PROJ])}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache with two commits of org/tiny: main is NEW, the tag v1 is OLD."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--org--tiny"
    write_model(folder / "snapshots" / OLD)
    write_model(folder / "snapshots" / NEW, weights=weights_with(**CHANGED))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    (folder / "refs" / "v1").write_text(OLD)
    return cache


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD), (NEW, NEW)]
)
def test_a_branch_a_tag_or_a_commit(hub, revision, commit, tmp_path):
    checkpoint = open_checkpoint("org/tiny", ModelOptions(revision=revision))
    recorded = {"model": "org/tiny", "revision": revision, "commit": commit}
    assert checkpoint.origin == {"hub": recorded}
    weights = files_of().weights if commit == OLD else weights_with(**CHANGED)
    assert_same_parameters(checkpoint.load(), load(write_model(tmp_path / "m", weights=weights)))


def test_a_revision_that_is_not_there_is_told(hub):
    with pytest.raises(UserError, match="org/tiny, revision v2: no such directory") as caught:
        open_checkpoint("org/tiny", ModelOptions(revision="v2"))
    assert "check the path or the id and --revision" in str(caught.value)


def test_a_revision_of_a_local_model_is_refused(tmp_path):
    options = ModelOptions(revision="main")
    for path in (write_model(tmp_path / "m"), write_gguf(tmp_path / "m.gguf")):
        with pytest.raises(
            UserError, match="--revision main belongs to a hub id, and --model_path"
        ):
            open_checkpoint(str(path), options)


def test_a_run_records_the_commit(hub, tmp_path):
    record = {"instruction": "The train", "input": "", "output": "waits"}
    jaxgrad.run_analysis(
        model_path="org/tiny",
        model_options=ModelOptions(revision="v1"),
        data_paths=[write_json(tmp_path / "d.json", [record])],
        output_dir=tmp_path / "run",
        options=jaxgrad.AnalyzeOptions(parameters=r"layers\.0\.self_attn\.q_proj"),
        say=lambda line: None,
        progress=False,
    )
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    hub_entry = run["sessions"][-1]["info"]["model_origin"]["hub"]
    assert hub_entry == {"model": "org/tiny", "revision": "v1", "commit": OLD}


def test_a_study_names_base_adapter_and_revision(hub, tmp_path):
    write_model(tmp_path / "base")
    write_json(tmp_path / "d.json", [{"instruction": "a", "input": "", "output": "b"}])
    study = tmp_path / "s.toml"
    study.write_text(
        'title = "t"\n[[models]]\nname = "old"\npath = "org/tiny"\nrevision = "v1"\n'
        '[[models]]\nname = "tuned"\npath = "./adapter"\nbase_model_path = "./base"\nadapter = "yes"\n'
        '[[models]]\nname = "gone"\npath = "org/tiny"\nrevision = "v2"\n'
        '[[data]]\nname = "d"\ncorrect = {none = "d.json"}\n'
    )
    config = read_study(study)
    old, tuned, _ = config.models
    assert config.model_options(old) == ModelOptions(revision="v1")
    assert config.model_options(tuned) == ModelOptions(str(tmp_path / "base"), "yes")
    where = plan_study(config, tmp_path / "out").models
    assert where["old"] == "org/tiny, in the hub's cache"
    assert where["gone"] == "org/tiny, to be fetched from the hub"
    study.write_text(study.read_text().replace('"yes"', '"maybe"'))
    with pytest.raises(UserError, match="adapter = 'maybe' is unknown: use one of auto, yes, no"):
        read_study(study)
