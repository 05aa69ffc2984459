"""Weights: every complete checkpoint is read right, each weight once, in blocks of any size."""

from collections import Counter

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
    assert_same_parameters,
    files_of,
    load,
    parameters,
    refusal,
    shape_of,
    weights_with,
    write_gguf,
    write_model,
)

from jaxgrad.checkpoints import open_checkpoint, sources
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.sources import Fingerprint, SafetensorsDirectory
from jaxgrad.errors import UserError

# Values


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_is_read_right(tmp_path, stored, target):
    weights = {name: values.astype(stored) for name, values in files_of().weights.items()}
    model = load(write_model(tmp_path / "m", weights=weights), target)
    ours = parameters(model)
    # Rounded once, from the stored values: another dtype in between would round twice.
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
    """Also if a file is reopened in the middle of a tensor."""
    if kind == "gguf":
        path = write_gguf(tmp_path / "m.gguf")
    else:
        tiny = TIED if kind.startswith("tied") else UNTIED
        weights = dict(files_of(tiny).weights)
        weights[HEAD] = weights.get(HEAD, weights[EMBEDDING])  # a copy, if it is tied
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
