"""Names of weights with the prefixes of wrappers: stripped where all weights fit then, else refused."""

from collections.abc import Callable
from pathlib import Path

import family_models
import numpy as np
import pytest
import torch
from checkpoint_files import (
    EMBEDDING,
    HEAD,
    TIED,
    assert_same_parameters,
    files_of,
    load,
    refusal,
    write_model,
)
from safetensors.numpy import load_file, save_file

from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.reference import load_torch_model

LAYER, BLOCK = ".layers.1.", ".self_attn."
FSDP, ACTIVATIONS = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."


def renamed(rename: Callable[[str], str], tiny=None) -> dict[str, np.ndarray]:
    files = files_of() if tiny is None else files_of(tiny)
    return {rename(name): values for name, values in files.weights.items()}


def fsdp(name: str) -> str:
    for part in (LAYER, BLOCK):
        name = name.replace(part, part + FSDP)
    return FSDP + name


# What a training program does to a name -> the edits that a run says.
FORMS = {
    "data_parallel": (lambda n: f"module.{n}", "without 'module.' (30)"),
    "compiled": (lambda n: f"_orig_mod.{n}", "without '_orig_mod.' (30)"),
    "compiled_inside": (
        lambda n: n.replace("model.", "model._orig_mod.", 1),
        "without '_orig_mod.' (29)",
    ),
    "compiled_in_parallel": (
        lambda n: f"module._orig_mod.{n}",
        "without 'module.' (30), without '_orig_mod.' (30)",
    ),
    "twice": (lambda n: f"module.module.{n}", "without 'module.' (30)"),
    "fsdp": (fsdp, f"without '{FSDP}' (30)"),
    "activation_checkpointing": (
        lambda n: n.replace(LAYER, LAYER + ACTIVATIONS),
        f"without '{ACTIVATIONS}' (9)",
    ),
    "peft": (lambda n: f"base_model.model.{n}", "without 'base_model.model.' (30)"),
    "lightning": (lambda n: f"model.{n}", "without 'model.' (30)"),
    "all_of_them": (
        lambda n: f"_forward_module.module._orig_mod.base_model.model.model.{fsdp(n)}",
        "without 'base_model.model.' (30)",
    ),
}


def test_the_number_of_weights():
    assert len(files_of().weights) == 30 == 3 * 9 + 3


@pytest.mark.parametrize("form", FORMS)
def test_prefixes_are_stripped_and_said(form, tmp_path):
    rename, told = FORMS[form]
    model = write_model(tmp_path / "m", weights=renamed(rename))
    (note,) = open_checkpoint(str(model)).notes
    assert note.startswith("names of the weights read ") and told in note
    plain = load(write_model(tmp_path / "plain"))
    ours = load(model)
    assert_same_parameters(ours, plain)
    assert ours.fingerprint == plain.fingerprint


@pytest.mark.parametrize("form", ["data_parallel", "all_of_them"])
def test_the_reference_has_all_weights_of_such_a_file(form, tmp_path):
    model = write_model(tmp_path / "m", weights=renamed(FORMS[form][0]))
    theirs = load_torch_model(str(model)).state_dict()
    for name, values in files_of().weights.items():
        assert torch.equal(theirs[name], torch.tensor(values)), name


def test_the_inner_model_alone_is_complete_if_the_head_is_tied(tmp_path):
    def bare(name: str) -> str:
        return name.removeprefix("model.")

    model = write_model(tmp_path / "m", tiny=TIED, weights=renamed(bare, TIED))
    (note,) = open_checkpoint(str(model)).notes
    assert "with 'model.' in front (29)" in note
    assert_same_parameters(load(model), load(write_model(tmp_path / "plain", tiny=TIED)))
    # A head of its own may stand beside it.
    model = write_model(tmp_path / "untied", weights=renamed(bare))
    assert_same_parameters(load(model), load(write_model(tmp_path / "plain2")))
    missing = {name: values for name, values in renamed(bare).items() if name != HEAD}
    message = refusal(write_model(tmp_path / "lost", weights=missing))
    assert (
        "even with their names read with 'model.' in front (29): 1 missing (lm_head.weight)"
        in message
    )


def test_names_that_need_nothing_say_nothing(tmp_path):
    assert open_checkpoint(str(write_model(tmp_path / "m"))).notes == ()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gpt2", "module."),
        ("gpt2_untied_by_depth", "model."),
        ("gpt_neox_parallel", "module._orig_mod.model."),
        ("gemma3_multimodal", "module."),
        ("gemma3_multimodal", "model."),
        ("phi3_mha_window", "base_model.model."),
    ],
)
def test_every_kind_of_family_is_fitted(name, prefix, tmp_path):
    plain = family_models.save_model(family_models.MODELS[name], tmp_path / "plain")
    model = family_models.save_model(family_models.MODELS[name], tmp_path / "m")
    path = model / "model.safetensors"
    save_file({prefix + n: values for n, values in load_file(path).items()}, path)
    assert_same_parameters(load(model), load(plain))


def test_inner_models_of_gpt_neox_and_gpt2(tmp_path):
    for name, base in (("gpt_neox_tied_sequential", "gpt_neox."), ("gpt2", "transformer.")):
        plain = family_models.save_model(family_models.MODELS[name], tmp_path / name)
        model = family_models.save_model(family_models.MODELS[name], tmp_path / f"{name}_inner")
        path = model / "model.safetensors"
        save_file({n.removeprefix(base): values for n, values in load_file(path).items()}, path)
        assert_same_parameters(load(model), load(plain))


# Refusals


def test_two_names_that_become_the_same_are_refused(tmp_path):
    weights = files_of().weights | {f"module.{EMBEDDING}": files_of().weights[EMBEDDING]}
    message = refusal(write_model(tmp_path / "m", weights=weights))
    assert f"module.{EMBEDDING} and {EMBEDDING} are the same weight" in message
    assert "remove the one that is not meant" in message


def test_a_set_that_fits_in_no_form_is_refused_with_the_closest(tmp_path):
    weights = renamed(lambda n: f"module.{n}")
    del weights["module.model.norm.weight"]
    weights["module.model.extra.weight"] = np.zeros(3, np.float32)
    message = refusal(write_model(tmp_path / "m", weights=weights))
    assert "even with their names read without 'module.' (" in message
    assert "1 missing (model.norm.weight), 1 not known (module.model.extra.weight)" in message


def test_an_unknown_prefix_is_refused_as_ever(tmp_path):
    weights = renamed(lambda n: f"student.{n}")
    message = refusal(write_model(tmp_path / "m", weights=weights))
    assert "30 missing (" in message and "30 not known (" in message and "even" not in message


def test_an_unmerged_peft_model_is_refused_by_name(tmp_path):
    def wrapped(name: str) -> str:
        return "base_model.model." + name.replace("q_proj.weight", "q_proj.base_layer.weight")

    weights = renamed(wrapped)
    for layer in range(3):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        weights |= {f"{stem}A.default.weight": np.zeros((2, 132), np.float32)}
        weights |= {f"{stem}B.default.weight": np.zeros((56, 2), np.float32)}
    message = refusal(write_model(tmp_path / "m", weights=weights))
    assert "they are those of a PEFT model that is not merged" in message


def test_hostile_names_take_no_time(tmp_path):
    weights = dict(files_of().weights)
    for count in (10_000, 20_000):
        weights["model." * count + "x"] = np.zeros(1, np.float32)
        weights["module." * count + "x"] = np.zeros(1, np.float32)
    assert "4 not known" in refusal(Path(write_model(tmp_path / "m", weights=weights)))
