"""Every family's weights: missing, unknown, misshapen or duplicate ones are named; fused ones are split."""

import functools
import json
import tempfile
from pathlib import Path

import family_models
import numpy as np
import pytest
from checkpoint_files import assert_same_parameters, load, refusal, write_json
from safetensors.numpy import load_file, save_file

from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.checkpoints.key_table import wanted_weights
from jaxgrad.models.families import FAMILIES, Key

# One model per family, if possible one with fused or renamed weights.
MODELS = {model.model_type: model for model in family_models.MODELS.values()}


@functools.cache
def files_of(model_type):
    """Name -> content of the saved model, and its weights."""
    with tempfile.TemporaryDirectory() as folder:
        directory = family_models.save_model(MODELS[model_type], Path(folder))
        weights = load_file(directory / "model.safetensors")
        others = {
            path.name: path.read_bytes()
            for path in directory.iterdir()
            if path.suffix != ".safetensors"
        }
    return others, weights


def write(directory, model_type, weights, **config):
    directory.mkdir()
    others, _ = files_of(model_type)
    for name, content in others.items():
        (directory / name).write_bytes(content)
    write_json(directory / "config.json", json.loads(others["config.json"]) | config)
    save_file(weights, directory / "model.safetensors")
    return str(directory)


def layer_weights(model_type):
    """Names in the files of the middle layer's weights, without those outside the decoder."""
    family = FAMILIES[model_type]
    return [
        name
        for name in files_of(model_type)[1]
        if ".1." in name and family.canonical(name) is not None
    ]


def assert_same_model(one, other):
    ours, theirs = load(one), load(other)
    assert_same_parameters(ours, theirs)
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_weight_that_is_missing_is_named(tmp_path, model_type):
    _, weights = files_of(model_type)
    lost = layer_weights(model_type)
    rest = {name: values for name, values in weights.items() if name not in lost}
    message = refusal(write(tmp_path / "m", model_type, rest))
    canonical = [FAMILIES[model_type].canonical(name) for name in lost]
    assert len(lost) >= 6 and f"{len(lost)} missing (" in message
    assert all(name in message for name in canonical)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_weight_that_is_misshapen_is_named_with_both_shapes(tmp_path, model_type):
    _, weights = files_of(model_type)
    spoiled = layer_weights(model_type)
    changed = {name: np.concatenate([weights[name], weights[name][:1]]) for name in spoiled}
    message = refusal(write(tmp_path / "m", model_type, weights | changed))
    assert f"{len(spoiled)} misshapen (" in message
    for name in spoiled:
        shape = list(weights[name].shape)
        told = f"{FAMILIES[model_type].canonical(name)} is {[shape[0] + 1, *shape[1:]]}"
        assert f"{told}, expected {shape}" in message


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_unknown_weight_is_named(tmp_path, model_type):
    _, weights = files_of(model_type)
    extra = {"model.layers.1.mlp.experts.0.up_proj.weight": np.ones((2, 3), np.float32)}
    message = refusal(write(tmp_path / "m", model_type, weights | extra))
    assert f"1 not known ({next(iter(extra))})" in message


# Model type -> a weight as transformers writes it, and its name in another generation of files.
OTHER_NAMES = {
    "gpt2": ("transformer.h.1.ln_1.weight", "h.1.ln_1.weight"),
    "gpt_neox": ("embed_out.weight", "lm_head.weight"),
    "gemma3": (
        "language_model.model.layers.1.mlp.up_proj.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("model_type", OTHER_NAMES)
def test_a_weight_under_two_names_is_refused(tmp_path, model_type):
    name, other = OTHER_NAMES[model_type]
    _, weights = files_of(model_type)
    weights = {name: np.ones((3, 2), np.float32)} | weights  # embed_out is not there when tied
    message = refusal(write(tmp_path / "m", model_type, weights | {other: weights[name]}))
    assert name in message and other in message and "are the same weight" in message


def test_gpt2_as_openai_published_it(tmp_path):
    """Without the prefix, and with the buffers of the causal mask."""
    _, weights = files_of("gpt2")
    old = {name.removeprefix("transformer."): values for name, values in weights.items()}
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = np.ones((1, 1, 9, 9), np.uint8)
        old[f"h.{layer}.attn.masked_bias"] = np.ones((), np.float32)
    assert_same_model(
        write(tmp_path / "new", "gpt2", weights), write(tmp_path / "old", "gpt2", old)
    )


def test_gpt_neox_as_pythia_is_published(tmp_path):
    """With the buffers of the mask and of the rope; the head under transformers 5's name."""
    tied = {"tie_word_embeddings": False}
    _, weights = files_of("gpt_neox")
    weights = weights | {"embed_out.weight": weights["gpt_neox.embed_in.weight"] + 1}
    old = dict(weights)
    old["lm_head.weight"] = old.pop("embed_out.weight")
    for layer in range(3):
        old[f"gpt_neox.layers.{layer}.attention.bias"] = np.ones((1, 1, 9, 9), np.uint8)
        old[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.ones((), np.float32)
        old[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    assert_same_model(
        write(tmp_path / "new", "gpt_neox", weights, **tied),
        write(tmp_path / "old", "gpt_neox", old, **tied),
    )


def test_gemma3_s_text_decoder_is_found_under_each_prefix(tmp_path):
    _, weights = files_of("gemma3")
    assert any(name.startswith("vision_tower.") for name in weights)
    names = {
        name: name.replace("language_model.model.", "model.language_model.") for name in weights
    }
    newer = {new if new != name else f"model.{name}": weights[name] for name, new in names.items()}
    assert_same_model(
        write(tmp_path / "old", "gemma3", weights), write(tmp_path / "new", "gemma3", newer)
    )


def test_phi_4_mini_s_code_is_neither_needed_nor_run(tmp_path):
    """Its config names Microsoft's own code, which is transformers' `phi3`."""
    _, weights = files_of("phi3")
    code = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    }
    plain, named = (
        write(tmp_path / "a", "phi3", weights),
        write(tmp_path / "b", "phi3", weights, auto_map=code),
    )
    trap = tmp_path / "trap"
    for name in ("configuration_phi3", "modeling_phi3"):
        (tmp_path / "b" / f"{name}.py").write_text(f"open({str(trap)!r}, 'w')")
    assert_same_model(plain, named)
    assert open_checkpoint(named).tokenizer.encode("train") and not trap.exists()


# Fused weights

PARTS = ("a", "b", "c")


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_are_cut_in_their_order(transposed, ndim):
    parts = [np.full((size, 5)[:ndim], i) for i, size in enumerate((4, 2, 3))]
    fused = np.concatenate(parts)
    key = Key("w", PARTS, transposed=transposed)
    found = key.split(fused.T if transposed else fused, (4, 2, 3), 1)
    for part, expected in zip(found, parts, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("ndim", [1, 2])
def test_parts_that_alternate_by_head_are_gathered(ndim):
    heads, size = 2, 3
    # Row r of part p has the value 100 p + r.
    parts = [np.arange(heads * size) + 100 * p for p in range(3)]
    fused = np.concatenate(
        [part[head * size : (head + 1) * size] for head in range(heads) for part in parts]
    )
    if ndim == 2:
        fused = np.stack([fused, fused + 0.5], 1)
        parts = [np.stack([part, part + 0.5], 1) for part in parts]
    found = Key("w", PARTS, by_head=True).split(fused, (6, 6, 6), heads)
    for part, expected in zip(found, parts, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "gpt2"])
def test_a_fused_weight_counts_once(model_type, tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m", model_type, files_of(model_type)[1]))
    wanted = wanted_weights(checkpoint.config, checkpoint.family)
    names = [
        name for name, weight in wanted.items() if "layers.attention.q.weight" in weight.parameters
    ]
    assert len(names) == checkpoint.config.num_layers
    assert all(len(wanted[name].parameters) == 3 for name in names)
