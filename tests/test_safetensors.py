"""Broken safetensors directories are refused in one line that says what is wrong and where."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import (
    HEAD,
    K_PROJ,
    assert_same_parameters,
    files_of,
    load,
    refusal,
    shape_of,
    weights_with,
    write_gguf,
    write_json,
    write_model,
)
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00003.safetensors"


# Weights that do not fit


def test_a_missing_weight_is_named(tmp_path):
    message = refusal(write_model(tmp_path / "m", weights=weights_with(**{K_PROJ: None})))
    assert f"1 missing ({K_PROJ})" in message
    assert str(tmp_path / "m") in message


def test_an_unknown_weight_is_named(tmp_path):
    extra = {"model.layers.1.self_attn.q_norm.weight": np.ones(7, np.float32)}
    message = refusal(write_model(tmp_path / "m", weights=weights_with(**extra)))
    assert "1 not known (model.layers.1.self_attn.q_norm.weight)" in message


def test_a_layer_beyond_the_config_is_unknown(tmp_path):
    message = refusal(write_model(tmp_path / "m", config={"num_hidden_layers": 2}))
    assert "9 not known (model.layers.2.input_layernorm.weight; " in message


def test_a_misshapen_weight_is_named_with_both_shapes(tmp_path):
    turned = np.ascontiguousarray(files_of().weights[K_PROJ].T)
    message = refusal(write_model(tmp_path / "m", weights=weights_with(**{K_PROJ: turned})))
    told = f"{K_PROJ} is {shape_of(K_PROJ)[::-1]}, expected {shape_of(K_PROJ)}"
    assert f"1 misshapen ({told})" in message


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_])
def test_an_integer_weight_is_named(tmp_path, dtype):
    values = np.ones(shape_of(K_PROJ), dtype)
    message = refusal(write_model(tmp_path / "m", weights=weights_with(**{K_PROJ: values})))
    assert f"1 unreadable ({K_PROJ} has dtype " in message


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_a_float8_weight_is_refused_for_want_of_its_scales(tmp_path, kind):
    values = np.ones(shape_of(K_PROJ), np.int8)
    model = write_model(tmp_path / "m", weights=weights_with(**{K_PROJ: values}))
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"I8"', f'"{kind}"'.encode(), 1))
    _repair_header_length(path, len(kind) - 2)
    assert f"{K_PROJ} has dtype {kind}, not float64, float32" in refusal(model)


def _repair_header_length(path: Path, grown: int) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little") + grown
    path.write_bytes(length.to_bytes(8, "little") + content[8:])


def test_all_misfits_stand_in_one_error(tmp_path):
    weights = weights_with(
        **{
            K_PROJ: None,
            "model.norm.weight": np.ones(3, np.float32),
            HEAD: np.ones(shape_of(HEAD), np.int8),
            "score.weight": np.ones((2, 7), np.float32),
            "extra": np.ones(1, np.float32),
        }
    )
    message = refusal(write_model(tmp_path / "m", weights=weights))
    for part in (
        f"1 missing ({K_PROJ})",
        f"1 misshapen (model.norm.weight is [3], expected {shape_of('model.norm.weight')})",
        f"1 unreadable ({HEAD} has dtype I8",
        "2 not known (extra; score.weight)",
    ):
        assert part in message


def test_weights_of_another_model_give_a_bounded_message(tmp_path):
    weights = {f"transformer.h.{i}.w": np.ones(2, np.float32) for i in range(50)}
    message = refusal(write_model(tmp_path / "m", weights=weights))
    assert f"{len(files_of().weights)} missing (" in message and "50 not known (" in message
    assert len(message) < 2000  # twenty names of each kind, and the count


def test_more_layers_than_weights_is_refused_at_once(tmp_path):
    model = write_model(tmp_path / "m", config={"num_hidden_layers": 9999})
    told = f"has 9999 layers, but the files hold {len(files_of().weights)} weights"
    assert told in refusal(model)


def test_weights_that_do_not_fit_the_config_s_biases(tmp_path):
    message = refusal(write_model(tmp_path / "m", config={"attention_bias": True}))
    assert "12 missing (model.layers.0.self_attn.k_proj.bias; " in message


# Shards


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_model(tmp_path / "sharded", num_shards=3)


def edit_index(model: Path, **changes: str) -> Path:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] |= changes
    write_json(model / INDEX, index)
    return model


def test_a_missing_shard_is_named(sharded):
    (sharded / FIRST_SHARD).unlink()
    assert f"1 of 3 shards missing: {FIRST_SHARD}" in refusal(sharded)


def test_a_weight_in_two_shards_is_named(sharded):
    second = sharded / "model-00002-of-00003.safetensors"
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    twice = next(name for name, file in weight_map.items() if file == FIRST_SHARD)
    own = next(name for name, file in weight_map.items() if file == second.name)
    save_file({name: files_of().weights[name] for name in (twice, own)}, second)
    message = refusal(sharded)
    assert f"{second}: weight {twice} is also in {FIRST_SHARD}" in message


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"metadata": {}}])
def test_an_index_without_weight_map_is_refused(sharded, index):
    write_json(sharded / INDEX, index)
    assert f"{sharded / INDEX} has no weight_map" in refusal(sharded)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "sub/model.safetensors", ".", None, 7, ["a"]]
)
def test_an_index_cannot_lead_out_of_the_directory(sharded, name):
    message = refusal(edit_index(sharded, **{K_PROJ: name}))
    assert f"{sharded / INDEX} names {name!r}, which is not a plain file name" in message


def test_an_index_that_names_what_no_file_system_takes_is_refused(sharded):
    message = refusal(edit_index(sharded, **{K_PROJ: "x" * 70000}))
    assert "xxx, which is not a plain file name" in message and len(message) < 600


@pytest.mark.parametrize("name", ["", "..", "no.safetensors"])
def test_an_index_must_name_files(sharded, name):
    message = refusal(edit_index(sharded, **{K_PROJ: name}))
    assert "1 of 4 shards missing" in message and name in message


def test_an_index_that_places_a_weight_in_another_shard_is_refused(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    there = weight_map[K_PROJ]
    other = next(file for file in weight_map.values() if file != there)
    message = refusal(edit_index(sharded, **{K_PROJ: other}))
    assert f"places weight {K_PROJ} in {other}, but it is in {there}" in message


def test_an_index_that_names_a_weight_which_is_nowhere_is_refused(sharded):
    message = refusal(edit_index(sharded, ghost=FIRST_SHARD))
    assert f"places weight ghost in {FIRST_SHARD}, but no shard has it" in message


def test_an_index_beside_a_single_file_is_refused(sharded):
    shutil.copy(sharded / FIRST_SHARD, sharded / "model.safetensors")
    message = refusal(sharded)
    assert "both model.safetensors and" in message and "remove one" in message


def test_shards_without_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert f"3 .safetensors files but no {INDEX}" in refusal(sharded)


def test_sharded_equals_single(sharded, tmp_path):
    single, many = load(write_model(tmp_path / "single")), load(sharded)
    assert_same_parameters(single, many)
    assert single.fingerprint == many.fingerprint


# Broken files


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("truncated in the data", lambda content: content[:-100]),
        ("truncated in the header", lambda content: content[:100]),
        ("truncated in the length", lambda content: content[:5]),
        ("empty", lambda content: b""),
        ("longer than it says", lambda content: content + b"\0" * 9),
        ("length of 2^60", lambda content: (2**60).to_bytes(8, "little") + content[8:]),
        ("length of 0", lambda content: bytes(8) + content[8:]),
        ("header is no JSON", lambda content: content[:8] + b"?" + content[9:]),
        ("header is no UTF-8", lambda content: content[:8] + b"\xff" + content[9:]),
        ("a git-lfs pointer", lambda content: b"version https://git-lfs.github.com/spec/v1\n"),
        ("a web page", lambda content: b"<!doctype html><html>Log in</html>"),
    ],
)
def test_a_broken_safetensors_file_is_named(tmp_path, name, spoil):
    model = write_model(tmp_path / "m")
    path = model / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    message = refusal(model)
    assert f"{path} is not a complete safetensors file" in message
    assert f"{path.stat().st_size} bytes" in message and "download it again" in message


def test_pickles_are_refused_unread(tmp_path):
    model = write_model(tmp_path / "m", weights={})
    trap = tmp_path / "trap"
    # Unpickling would run this, and write a file.
    line = f"import pathlib; pathlib.Path({str(trap)!r}).touch()"
    payload = f"cbuiltins\nexec\n(S{line!r}\ntR.".encode()
    (model / "pytorch_model.bin").write_bytes(payload)
    message = refusal(model)
    assert "pickled weights only (pytorch_model.bin): refused" in message
    assert "convert the model to safetensors" in message
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists(), "the trap does not work"


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    model = write_model(tmp_path / "m")
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load(model).weight_bytes > 0


def test_a_directory_without_weights_is_told_what_to_hold(tmp_path):
    message = refusal(write_model(tmp_path / "m", weights={}))
    assert "has no weights: expected model.safetensors" in message


def test_an_empty_directory_is_no_model(tmp_path):
    message = refusal(tmp_path)
    assert "is not a Hugging Face model: it has no config.json" in message


def test_a_directory_of_gguf_files_is_told_to_give_one(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert f"it holds GGUF files: give one of them, such as {path}" in refusal(tmp_path)


def test_an_adapter_of_no_known_kind_is_told_to_be_merged(tmp_path):
    write_json(tmp_path / "adapter_config.json", {})
    message = refusal(tmp_path)
    assert "the method (peft_type) is None; only LORA is merged here: merge it with PEFT" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"model_type": "llama", ', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"{}", "no model_type"),
    ],
)
def test_a_broken_config_is_named(tmp_path, content, told):
    model = write_model(tmp_path / "m")
    (model / "config.json").write_bytes(content)
    message = refusal(model)
    assert f"{model}/config.json" in message and told in message


def test_a_config_that_is_a_directory_is_named(tmp_path):
    model = write_model(tmp_path / "m")
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert f"{model / 'config.json'} cannot be read" in refusal(model)


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_at(tmp_path):
    model = write_model(tmp_path / "m", config={"model_type": "mamba"}, weights={}, tokenizer=False)
    message = refusal(model)
    assert "'mamba'" in message and "llama (LlamaForCausalLM)" in message
