"""LoRA adapters: merged as PEFT merges them, or refused."""

import functools
import shutil
from pathlib import Path

import family_models
import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
from adapter_files import (
    assert_merged_alike,
    change_config,
    change_tensors,
    load_adapter,
    make_adapter,
    merged_by_peft,
    tensors_of,
)
from checkpoint_files import (
    EMBEDDING,
    HEAD,
    TIED,
    UNTIED,
    assert_same_parameters,
    files_of,
    load,
    parameters,
    write_gguf,
    write_hub_cache,
    write_model,
)
from safetensors.numpy import save_file

import jaxgrad
from jaxgrad.checkpoints import lora_config, open_checkpoint, sources
from jaxgrad.checkpoints.convert import convert_model
from jaxgrad.errors import UserError
from jaxgrad.options import ModelOptions
from jaxgrad.reference import load_torch_model

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Name of a model -> its directory, made once."""
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def place(name: str) -> Path:
        if name in family_models.MODELS:
            return family_models.save_model(family_models.MODELS[name], folder / name)
        return write_model(folder / name, tiny={"untied": UNTIED, "tied": TIED}[name])

    return place


@pytest.fixture(scope="module")
def plain(places, tmp_path_factory):
    """An adapter on q and v of the untied Llama."""
    return make_adapter(places("untied"), tmp_path_factory.mktemp("plain") / "a")


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    """A copy of `plain`, to change."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def refusal(directory: Path, base: Path | str | None = None, **options) -> str:
    if base is not None:
        options["base_model_path"] = str(base)
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(directory), ModelOptions(**options)).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Equal to PEFT's merge

CASES = {
    "q_v": ("untied", {}),
    "rslora": ("untied", {"use_rslora": True}),
    "all_linear": ("untied", {"target_modules": "all-linear", "r": 5}),
    "regex": ("untied", {"target_modules": r".*\.[12]\.mlp\.(up|down)_proj"}),
    "patterns": (
        "untied",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {r"layers\.[01]\..*[kn]_proj": 2, "q_proj": 1},
            "alpha_pattern": {r"^model\.layers\.2\.self_attn\.q_proj": 11, "down_proj": 2.5},
            "use_rslora": True,
        },
    ),
    "some_layers": ("untied", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "excluded": ("untied", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "head": ("untied", {"target_modules": ["lm_head", "o_proj"]}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved": (
        "untied",
        {"modules_to_save": ["embed_tokens", "lm_head", "norm", "post_attention_layernorm"]},
    ),
    "saved_module": ("untied", {"modules_to_save": ["mlp"]}),
    "untied_by_saving_both": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "untied_by_saving_the_embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "untied_by_saving_the_head": ("tied", {"modules_to_save": ["lm_head"]}),
    "negative_alpha": ("tied", {"lora_alpha": -3}),
    "zero_alpha": ("tied", {"lora_alpha": 0}),
    "biases": ("llama_gqa_bias", {"bias": "all", "target_modules": ["q_proj", "up_proj"]}),
    "biases_of_lora": ("llama_gqa_bias", {"bias": "lora_only"}),
    "lora_bias": ("llama_gqa_bias", {"lora_bias": True}),
    "phi3_fused": (
        "phi3_gqa_tied_longrope",
        {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    ),
    "gpt2": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2_positions": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "gpt2_lora_bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "neox": (
        "gpt_neox_parallel",
        {"target_modules": ["query_key_value", "dense", "embed_in", "lm_head"]},
    ),
    "gemma3_multimodal": (
        "gemma3_multimodal",
        {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    ),
    "eva": ("untied", {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts(case, places, tmp_path):
    name, options = CASES[case]
    base = places(name)
    adapter = make_adapter(base, tmp_path / "a", **options)
    theirs = load(merged_by_peft(base, adapter, tmp_path / "merged"))
    ours = load_adapter(adapter)
    assert_merged_alike(ours, theirs)
    if case != "zero_alpha":
        assert ours.fingerprint != load(base).fingerprint


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_a_half_or_double_base_is_merged_in_float32_or_float64(stored, plain, tmp_path):
    weights = {name: values.astype(stored) for name, values in files_of().weights.items()}
    base = write_model(tmp_path / "base", weights=weights)
    source = open_checkpoint(str(plain), ModelOptions(base_model_path=str(base))).source
    assert source.dtype(f"{Q0}.weight") == ("float64" if stored == "float64" else "float32")
    assert source.dtype("model.layers.0.self_attn.k_proj.weight") == stored
    tensors = tensors_of(plain)
    a, b = (tensors[f"base_model.model.{Q0}.lora_{k}.weight"].astype(np.float64) for k in "AB")
    wanted = weights[f"{Q0}.weight"].astype(np.float64) + 7 / 3 * b @ a
    ours = open_checkpoint(str(plain), ModelOptions(base_model_path=str(base))).load("float64")
    found = parameters(ours)["layers.attention.q.weight"][0]
    assert np.abs(found - wanted.astype(source.dtype(f"{Q0}.weight"))).max() <= 1e-12


def test_a_merge_in_bfloat16_rounds_once_as_pefts_does(plain, tmp_path):
    weights = {n: v.astype(ml_dtypes.bfloat16) for n, v in files_of().weights.items()}
    base = write_model(tmp_path / "base", weights=weights, config={"dtype": "bfloat16"})
    merged = merged_by_peft(base, plain, tmp_path / "merged", torch.bfloat16)
    ours, theirs = load_adapter(plain, base, "bfloat16"), load(merged, "bfloat16")
    # PEFT adds in float32, we in float64: a sum near the middle of two values may round to the other.
    assert_merged_alike(ours, theirs, tolerance=2.0**-8)
    mine, wanted = parameters(ours), parameters(theirs)
    differing = sum((mine[n] != wanted[n]).sum() for n in wanted)
    assert differing <= 1e-4 * sum(values.size for values in wanted.values())


def test_the_base_may_be_a_gguf_file(plain, tmp_path):
    file = write_gguf(tmp_path / "m.gguf")
    ours = load_adapter(plain, file)
    theirs = load(merged_by_peft(write_model(tmp_path / "base"), plain, tmp_path / "merged"))
    assert_merged_alike(ours, theirs)


def test_the_vocabulary_may_grow(places, tmp_path):
    base, name = places("untied"), "base_model.model."
    vocab, width = files_of().weights[EMBEDDING].shape
    rows = np.random.default_rng(0).standard_normal((vocab + 5, width), np.float32)
    adapter = make_adapter(base, tmp_path / "a")
    change_tensors(adapter, **{name + EMBEDDING: rows, name + HEAD: 2 * rows})
    ours = load_adapter(adapter)
    assert ours.config.vocab_size == vocab + 5
    assert np.array_equal(parameters(ours)["embedding"], rows)
    assert np.array_equal(parameters(ours)["lm_head.weight"], 2 * rows)
    model = load_torch_model(str(adapter))
    assert torch.equal(model.lm_head.weight, torch.tensor(2 * rows))
    assert "must hold head and embedding" in refusal(change_tensors(adapter, **{HEAD: None}))


def test_an_enlarged_tied_embedding_stays_tied(places, tmp_path):
    base, name = places("tied"), "base_model.model."
    vocab, width = files_of(TIED).weights[EMBEDDING].shape
    rows = np.random.default_rng(0).standard_normal((vocab + 5, width), np.float32)
    adapter = make_adapter(base, tmp_path / "a")
    change_tensors(adapter, **{name + EMBEDDING: rows, name + HEAD: rows})
    assert load_adapter(adapter).config.tied_embeddings
    assert f"{HEAD} differs from {EMBEDDING}" in refusal(
        change_tensors(adapter, **{HEAD: 2 * rows})
    )


def test_the_tokenizer_is_the_adapters_own_or_the_bases(adapter, places, tmp_path):
    options = ModelOptions(base_model_path=str(places("untied")))
    assert open_checkpoint(str(adapter), options).tokenizer_place == places("untied")
    tokenizer = tiny_models.build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    message = refusal(adapter, places("untied"))
    assert "its tokenizer has 1 tokens beyond the" in message and "'<new>'" in message
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    message = refusal(adapter, places("untied"))
    assert "chat_template.jinja, but no tokenizer.json" in message
    shutil.copy(places("untied") / "tokenizer.json", adapter)  # the mend
    assert open_checkpoint(str(adapter), options).tokenizer_place == adapter


def test_the_fingerprint_is_of_base_and_adapter(places, adapter, tmp_path):
    base = places("untied")
    first = load_adapter(adapter, base).fingerprint
    assert load_adapter(adapter, base, "bfloat16").fingerprint == first
    assert load_adapter(change_config(adapter, lora_alpha=8)).fingerprint != first
    change_config(adapter, lora_alpha=7)
    assert load_adapter(adapter).fingerprint == first
    # With a scale of zero the merged weights are the base's, but the adapter is there.
    zero = load_adapter(change_config(adapter, lora_alpha=0)).fingerprint
    assert zero not in (first, load(base).fingerprint)
    other = make_adapter(base, tmp_path / "other", seed=1)
    assert load_adapter(other).fingerprint != first


def test_a_run_tells_and_records_the_merge(adapter, places, tmp_path):
    checkpoint = open_checkpoint(str(adapter), ModelOptions(base_model_path=str(places("untied"))))
    assert checkpoint.notes[0] == (
        f"adapter {adapter} merged into {places('untied')}: LoRA added to 6 weights, 0 replaced; "
        "tokenizer of the base"
    )
    assert checkpoint.origin["merged"] == {"lora": 6, "replaced": []}
    assert {"adapter_model.safetensors", "base/model.safetensors"} <= checkpoint.files.keys()
    zero = open_checkpoint(str(change_config(adapter, lora_alpha=0)))
    assert any("lora_alpha is 0" in note for note in zero.notes)


def test_memory_holds_one_block_of_a_weight(adapter, monkeypatch):
    whole = parameters(load_adapter(adapter))
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    blocks = parameters(load_adapter(adapter))
    for name, values in whole.items():
        assert values.tobytes() == blocks[name].tobytes(), name


def test_a_conversion_is_merged(adapter, places, tmp_path):
    lines: list[str] = []
    options = ModelOptions(base_model_path=str(places("untied")))
    convert_model(str(adapter), tmp_path / "c", options, say=lines.append, progress=False)
    assert any("merged into" in line for line in lines)
    converted = load(tmp_path / "c")
    assert_same_parameters(converted, load_adapter(adapter))
    assert converted.fingerprint == load_adapter(adapter).fingerprint
    message = refusal(adapter, tmp_path / "c")
    assert "is a converted checkpoint; give the model that it was converted from" in message


def test_an_adapter_of_the_hub_names_its_base(places, plain, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    write_hub_cache(cache, "org/base")
    named = {"base_model_name_or_path": "org/base", "revision": None}
    adapter = change_config(Path(shutil.copytree(plain, tmp_path / "a")), **named)
    checkpoint = open_checkpoint(str(adapter))
    assert checkpoint.origin["base"]["commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert_same_parameters(load_adapter(adapter), load_adapter(plain))
    message = refusal(change_config(adapter, revision="v2"))
    assert "its base org/base, revision v2" in message and "as --base_model_path" in message
    assert_same_parameters(load_adapter(adapter, places("untied")), load_adapter(plain))  # mended


# Which of two


def test_a_directory_with_whole_weights_and_an_adapter_must_be_told_which(plain, tmp_path):
    both = write_model(tmp_path / "both")
    for path in plain.glob("adapter*"):
        shutil.copy(path, both)
    message = refusal(both)
    assert "--adapter=no for the whole weights alone, or --adapter=yes" in message
    whole = jaxgrad.load_model(str(both), options=ModelOptions(adapter="no"))
    assert_same_parameters(whole, load(write_model(tmp_path / "m")))
    merged = jaxgrad.load_model(str(both), options=ModelOptions(adapter="yes"))
    assert_same_parameters(merged, load_adapter(plain))
    # Its own whole weights may be the base.
    merged = jaxgrad.load_model(str(both), options=ModelOptions(str(both), "yes"))
    assert_same_parameters(merged, load_adapter(plain))


def test_options_that_do_not_fit_the_directory_are_told(places, adapter):
    base = places("untied")
    assert "has no adapter_config.json; give the directory" in refusal(base, adapter="yes")
    assert "--base_model_path is the base of an adapter, and" in refusal(base, base)
    assert "is read without its adapter (--adapter=no)" in refusal(adapter, base, adapter="no")
    assert "give it with --adapter=auto" in refusal(adapter, adapter="no")
    assert "is an adapter itself" in refusal(adapter, adapter)
    assert "names no base model" in refusal(change_config(adapter, base_model_name_or_path=None))
    message = refusal(change_config(adapter, base_model_name_or_path="/home/me/base"))
    assert "its base /home/me/base: no such file or directory" in message


# Refusals of adapter_config.json

REFUSED = {
    "IA3": {"peft_type": "IA3"},
    "LOHA": {"peft_type": "LOHA"},
    "VERA": {"peft_type": "VERA"},
    "ADALORA": {"peft_type": "ADALORA"},
    "None": {"peft_type": None},
    "PROMPT_TUNING changes the input": {"peft_type": "PROMPT_TUNING"},
    "PREFIX_TUNING changes the input": {"peft_type": "PREFIX_TUNING"},
    "DoRA (use_dora)": {"use_dora": True},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "layer replication": {"layer_replication": [[0, 2], [1, 3]]},
    "activated LoRA": {"alora_invocation_tokens": [5]},
    "LoRA on bare parameters": {"target_parameters": ["experts.down_proj"]},
    "'pissa_niter_16'": {"init_lora_weights": "pissa_niter_16"},
    "'loftq'": {"init_lora_weights": "loftq"},
    "'olora'": {"init_lora_weights": "olora"},
    "init_lora_weights is 'magic'": {"init_lora_weights": "magic"},
    "r is 0, not a whole number from 1 to": {"r": 0},
    "r is 10000000000": {"r": 10**400},
    "use_rslora is 1, not true or false": {"use_rslora": 1},
    "unknown attributes (threshold = 0)": {"threshold": 0},
    "r is 2.5": {"r": 2.5},
    "lora_alpha is nan, not a finite number": {"lora_alpha": float("nan")},
    "lora_alpha is True": {"lora_alpha": True},
    "use_rslora is 'yes', not true or false": {"use_rslora": "yes"},
    "rank_pattern['q_proj'] is 0": {"rank_pattern": {"q_proj": 0}},
    "a regular expression (": {"rank_pattern": {"q_proj(": 2}},
    "shorter than 2000 characters": {"alpha_pattern": {"q" * 3000: 2}},
    "modules_to_save is 3, not a list of names": {"modules_to_save": 3},
    "bias is 'some', not one of none, all, lora_only": {"bias": "some"},
    "unknown attributes (new_option = 3, other = [1])": {"new_option": 3, "other": [1]},
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(told, adapter, places):
    message = refusal(change_config(adapter, **REFUSED[told]), places("untied"))
    assert told in message
    assert "merge" in message or "base model instead" in message


def test_unknown_attributes_that_are_off_are_noted(adapter):
    change_config(adapter, new_option=None, other=False)
    assert (
        "unknown attributes that are off: new_option, other" in open_checkpoint(str(adapter)).notes
    )


BOMB = r"(a|[a-z]|\w|\.|_)+[^\w.]"  # 2^32 ways to read a name


def test_a_regular_expression_that_takes_for_ever_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.1)
    for where in ("rank_pattern", "alpha_pattern"):
        change_config(adapter, **{where: {BOMB: 2}})
        assert "needs more than" in refusal(adapter)
        change_config(adapter, **{where: {}})
    change_config(adapter, target_modules=BOMB)
    assert "write it more simply" in refusal(adapter)


def test_patterns_that_leave_alpha_open_are_refused(adapter):
    change_config(adapter, alpha_pattern={"q_proj": 2, "self_attn.q_proj": 3})
    assert "alpha_pattern has 2 values for model.layers.0.self_attn.q_proj" in refusal(adapter)
    change_config(adapter, alpha_pattern={"q_proj": 2})
    load_adapter(adapter)


# Refusals of its tensors

A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    ("told", "changes"),
    [
        ("lora_A.weight is [4, 132], expected [3, 132]", {A0: np.zeros((4, 132), np.float32)}),
        ("lora_B.weight is [56, 5], expected [56, 3]", {B0: np.zeros((56, 5), np.float32)}),
        ("lora_A.weight is [132, 3], expected [3, 132]", {A0: np.zeros((132, 3), np.float32)}),
        ("lora_A.weight is [0, 132]", {A0: np.zeros((0, 132), np.float32)}),
        ("lora_A.weight is [396], expected", {A0: np.zeros(396, np.float32)}),
        (f"{B0} has no partner lora_A.weight", {A0: None}),
        (f"{Q0} is in target_modules, but the file has no LoRA for it", {A0: None, B0: None}),
        (
            "model.layers.0.self_attn.k_proj has LoRA, but is not in target_modules",
            {
                A0.replace("q_proj", "k_proj"): np.zeros((3, 132), np.float32),
                B0.replace("q_proj", "k_proj"): np.zeros((28, 3), np.float32),
            },
        ),
        (
            "belongs to no weight of the base",
            {A0.replace("layers.0", "layers.7"): np.zeros((3, 132))},
        ),
        ("is not in modules_to_save", {"base_model.model.model.norm.weight": np.zeros(132)}),
        ("is not a weight of LoRA", {"base_model.model.scale": np.zeros(132)}),
        ("has dtype I64", {A0: np.zeros((3, 132), np.int64)}),
        (
            f"module.{A0} and {A0} are the same weight",
            {f"module.{A0}": np.zeros((3, 132), np.float32)},
        ),
        ("is not expected for that layer", {B0.replace("weight", "bias"): np.zeros(56)}),
    ],
)
def test_tensors_that_do_not_fit_are_named(told, changes, adapter):
    tensors = tensors_of(adapter)
    for name, values in changes.items():
        tensors[name] = values
    tensors = {name: values for name, values in tensors.items() if values is not None}
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refusal(adapter)
    assert told in message and "does not fit adapter_config.json and the base's" in message


def test_another_base_is_told(plain, places):
    message = refusal(plain, places("llama_gqa_bias"))
    assert "expected [3, 52]" in message and "give the base that it was trained on" in message


def test_values_that_are_not_finite_are_named(adapter):
    values = tensors_of(adapter)[B0]
    values[3, 1] = np.inf
    assert "holds values that are not finite" in refusal(change_tensors(adapter, **{B0: values}))


def test_lora_on_a_tied_weight_is_refused(places, tmp_path):
    """In training the two sides differ, in PEFT's merge they do not."""
    base = places("tied")
    for module in ("embed_tokens", "lm_head"):
        adapter = make_adapter(base, tmp_path / module, target_modules=[module, "q_proj"])
        message = refusal(adapter)
        assert "but the base ties head and embedding" in message
    untied = write_model(tmp_path / "untied", tiny=TIED, config={"tie_word_embeddings": False})
    weights = files_of(TIED).weights
    save_file(weights | {HEAD: weights[EMBEDDING]}, untied / "model.safetensors")
    ours = load_adapter(adapter, untied)  # the mend
    assert not np.array_equal(parameters(ours)["lm_head.weight"], weights[EMBEDDING])
    assert np.array_equal(parameters(ours)["embedding"], weights[EMBEDDING])


def test_lora_bias_without_a_bias_is_refused(adapter):
    change_config(adapter, lora_bias=True)
    change_tensors(adapter, **{B0.replace("weight", "bias"): np.zeros(56, np.float32)})
    assert "is for a bias, but the layer has none" in refusal(adapter)


def test_pickles_and_damaged_files_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a complete safetensors file" in refusal(adapter)
    path.rename(adapter / "adapter_model.bin")
    message = refusal(adapter)
    assert "unpickling runs code" in message and "safe_serialization=True" in message
    (adapter / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refusal(adapter)
    (adapter / "adapter_config.json").write_text("[")
    assert "is not valid JSON" in refusal(adapter)


def test_names_with_prefixes_of_wrappers_are_fitted(adapter, plain):
    tensors = {
        name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): values
        for name, values in tensors_of(adapter).items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert_same_parameters(load_adapter(adapter), load_adapter(plain))
    assert any("_checkpoint_wrapped_module" in note for note in open_checkpoint(str(adapter)).notes)


# The reference


def test_the_reference_merges_by_peft(places, tmp_path):
    """Its weights are ours to the last bit, though they come from PEFT's merge in float64."""
    adapter = make_adapter(places("untied"), tmp_path / "a", target_modules="all-linear")
    theirs = load_torch_model(str(adapter), dtype="float64").state_dict()
    ours = parameters(load_adapter(adapter, dtype="float64"))
    for name in ("q", "k", "v", "o"):
        for layer, values in enumerate(ours[f"layers.attention.{name}.weight"]):
            wanted = theirs[f"model.layers.{layer}.self_attn.{name}_proj.weight"].numpy()
            assert wanted.dtype == values.dtype == np.float64
            assert np.array_equal(values, wanted)
