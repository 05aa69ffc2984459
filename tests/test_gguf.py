"""GGUF files: config, weights and names are those of the original model."""

import dataclasses

import gguf
import gguf_files
import jax
import numpy as np
import pytest
import torch
from checkpoint_files import (
    K_PROJ,
    assert_same_parameters,
    gguf_bytes,
    load,
    refusal,
    shape_of,
    write_gguf,
    write_model,
)
from gguf_files import CASES, Q8_0, Case

from jaxgrad.checkpoints.fill import fill_decoder
from jaxgrad.checkpoints.gguf_families import GGUF_FAMILIES, config_from_metadata
from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.key_table import CanonicalSource
from jaxgrad.checkpoints.sources import SafetensorsDirectory, read_model_config
from jaxgrad.errors import UserError
from jaxgrad.models.families import read_config
from jaxgrad.models.families.attributes import IRRELEVANT


@pytest.fixture(scope="module", params=CASES)
def file_and_model(request, tmp_path_factory):
    """A GGUF file in float32 and its original transformers model."""
    case = CASES[request.param]
    model = gguf_files.build_model(case.config())
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return GgufFile(gguf_files.write_gguf(path, model)), model


def test_the_config_is_the_original_s(file_and_model):
    file, model = file_and_model
    raw = file.hf_config()
    assert raw.pop("model_type") == model.config.model_type
    ours, original = type(model.config)(**raw).to_dict(), model.config.to_dict()
    passive = IRRELEVANT | {"architectures", "use_sliding_window", "max_window_layers"}
    matters = set(original) - passive
    assert {name: ours[name] for name in matters} == {name: original[name] for name in matters}
    # All attributes are known to the family's config class, except one that the hub's files have.
    assert set(ours) - set(original) <= {"sliding_window_pattern"}


def test_the_weights_are_the_original_s(file_and_model):
    file, model = file_and_model
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    assert file.shapes() == {name: values.shape for name, values in weights.items()}
    for name, values in weights.items():
        read = file.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, name)
        assert file.why_unreadable(name) is None


def test_transformers_computes_the_same_from_the_config_and_the_weights(file_and_model):
    """The config lacks nothing that changes an output; the text is longer than any window."""
    file, model = file_and_model
    raw = file.hf_config()
    assert raw.pop("model_type") == model.config.model_type
    rebuilt = type(model)(type(model.config)(**raw, attn_implementation="eager")).eval()
    weights = {name: torch.tensor(file.read(name)) for name in file.shapes()}
    missing, unexpected = rebuilt.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    token_ids = torch.arange(90)[None] * 7 % 263
    with torch.no_grad():
        np.testing.assert_array_equal(rebuilt(token_ids).logits, model(token_ids).logits)


def test_the_decoder_is_that_of_the_directory(file_and_model, tmp_path):
    """Config and parameters from the GGUF file and from safetensors."""
    file, model = file_and_model
    model.save_pretrained(tmp_path)
    family, config = read_config(file.hf_config(), file.where)
    same_family, same_config = read_config(read_model_config(tmp_path), str(tmp_path))
    assert family == same_family
    # Numbers in the file are float32.
    assert config.norm_epsilon == pytest.approx(same_config.norm_epsilon, rel=1e-6)
    assert config == dataclasses.replace(same_config, norm_epsilon=config.norm_epsilon)
    directory = CanonicalSource(SafetensorsDirectory(tmp_path), family, config)
    states = [fill_decoder(config, family, source, np.float32)[1] for source in (file, directory)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("architecture", GGUF_FAMILIES)
def test_quantized_weights_are_near_and_vectors_exact(tmp_path, architecture):
    model = gguf_files.build_model(Case(architecture, blocks=True).config())
    file = GgufFile(gguf_files.write_gguf(tmp_path / "q8.gguf", model, quantization=Q8_0))
    for name in file.shapes():
        original, read = model.state_dict()[name].numpy(), file.read(name)
        if original.ndim == 1:
            np.testing.assert_array_equal(read, original, name)
            continue
        # A block's largest magnitude is 127 steps; the step itself is rounded to float16.
        blocks = original.reshape(-1, 32)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        error = np.abs(read.reshape(-1, 32) - blocks)
        assert (error <= largest * (0.5 / 127 + 2.0**-11)).all(), name


# Configs


SIZES = {
    "context_length": 8192,
    "embedding_length": 5376,
    "feed_forward_length": 21504,
    "block_count": 3,
    "attention.head_count": 32,
    "attention.head_count_kv": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "attention.sliding_window": 1024,
    "rope.freq_base": 1e6,
}


def config_of(architecture, divisors=None, **changes):
    """The config from `SIZES` with other entries ("__" for a dot); None removes one."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    values = {name: value for name, value in (SIZES | changes).items() if value is not None}
    if architecture not in ("gemma2", "gemma3"):
        values.pop("attention.sliding_window", None)
    return config_from_metadata(architecture, values, {}, divisors)


@pytest.mark.parametrize(
    ("architecture", "num_layers", "width", "scalar"),
    [
        # From the config.json of google/gemma-2-9b and -27b, google/gemma-3-12b and -27b.
        ("gemma2", 42, 3584, 128),
        ("gemma2", 46, 4608, 144),
        ("gemma3", 48, 3840, 128),
        ("gemma3", 62, 5376, 168),
    ],
)
def test_the_scale_of_the_scores_goes_by_the_size(architecture, num_layers, width, scalar):
    config, problems = config_of(architecture, block_count=num_layers, embedding_length=width)
    assert not problems
    assert config["query_pre_attn_scalar"] == scalar


def test_what_old_gemma_files_leave_out():
    config, problems = config_of(
        "gemma2",
        attention__sliding_window=None,
        rope__freq_base=None,
        attention__head_count_kv=None,
    )
    assert not problems
    assert config["sliding_window"] == 4096 and config["rope_theta"] == 10000.0
    assert config["attn_logit_softcapping"] == 50.0 and config["final_logit_softcapping"] == 30.0
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 32
    config, problems = config_of("gemma3")
    assert not problems
    assert config["rope_local_base_freq"] == 10000.0 and config["sliding_window_pattern"] == 6


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"rope__scaling__type": "none"}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_linear_scaling_as_llama_cpp_understands_it(changes, scaling):
    config, problems = config_of("llama", **changes)
    assert not problems
    assert config.get("rope_scaling") == scaling


def llama3_divisors(theta=500000.0, factor=32.0):
    rope = gguf_files.LLAMA3_ROPE | {"rope_theta": theta, "factor": factor}
    case = Case("llama", {"rope_parameters": rope})
    config = case.config()
    config.head_dim = 128
    return gguf_files.rope_divisors(config)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_published_rope_of_llama_3_is_found_again(factor):
    divisors = llama3_divisors(factor=factor)
    assert divisors.dtype == np.float32 and divisors.shape == (64,)
    config, problems = config_of("llama", divisors, rope__freq_base=500000.0)
    assert not problems
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config_of("llama", np.ones_like(divisors))[0].get("rope_scaling") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda divisors: divisors * np.where(np.arange(64) == 30, 1.001, 1).astype(np.float32),
        lambda divisors: divisors[:-1],
        lambda divisors: divisors[::-1],
        lambda divisors: np.full_like(divisors, 8.0),
        lambda divisors: np.full_like(divisors, np.nan),
    ],
)
def test_other_divisors_than_llama_3_s_are_refused(spoil):
    _, problems = config_of("llama", spoil(llama3_divisors()), rope__freq_base=500000.0)
    assert len(problems) == 1 and "does not give the frequencies of the tensor" in problems[0]


def test_divisors_and_a_linear_scaling_contradict_each_other():
    _, problems = config_of(
        "llama", llama3_divisors(), rope__freq_base=500000.0, rope__scaling__factor=2.0
    )
    assert problems == ["llama.rope.scaling.factor = 2.0 contradicts the tensor rope_freqs.weight"]


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("qwen2", {"rope__scaling__type": "yarn"}, "qwen2.rope.scaling.type = 'yarn' is not known"),
        ("qwen2", {"attention__sliding_window_pattern": 2}, "is not known"),
        ("qwen3", {"expert_count": 128}, "expert_count = 128 (a mixture of experts"),
        ("gemma2", {"attention__sliding_window_pattern": 3}, "pattern = 3 is not known"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "softcapping = 50.0 is not known"),
        ("gemma3", {"attention__sliding_window": None}, "attention.sliding_window is missing"),
        ("gemma3", {"rope__freq_base": None}, "rope.freq_base is missing"),
        ("gemma3", {"rope__freq_base_swa": 0.0}, "freq_base_swa is 0.0, not a positive number"),
        ("gemma3", {"rope__scaling__factor": -1.0}, "rope.scaling.factor is -1.0"),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__factor": 2.0}, "factor is 2.0"),
        ("llama", {"rope__freq_base": float("nan")}, "rope.freq_base is nan, not a positive"),
        (
            "llama",
            {"attention__key_length": 0, "attention__value_length": 0},
            "value_length is 0, no",
        ),
        ("llama", {"attention__head_count_kv": [1, 2]}, "head_count_kv is [1, 2], not a positive"),
    ],
)
def test_entries_that_are_not_understood(architecture, changes, told):
    _, problems = config_of(architecture, **changes)
    assert any(told in problem for problem in problems), problems


# Whole files


def test_gguf_equals_the_directory(tmp_path):
    directory, file = load(write_model(tmp_path / "m")), load(write_gguf(tmp_path / "m.gguf"))
    assert file.config == directory.config
    assert_same_parameters(directory, file)
    assert file.fingerprint == directory.fingerprint


@pytest.mark.parametrize("name", ["llama.vocab_size", "tokenizer.ggml.padding_token_id"])
def test_gguf_entries_that_may_be_left_out(tmp_path, name):
    whole, without = (
        load(write_gguf(tmp_path / f"{i}.gguf", metadata=changes))
        for i, changes in enumerate([{}, {name: None}])
    )
    assert whole.config == without.config


def test_llama_cpp_s_bookkeeping_is_no_reason_to_refuse(tmp_path):
    entries = {
        "general.license": "apache-2.0",
        "general.tags": ["chat", "text-generation"],
        "general.base_model.0.name": "tiny",
        "quantize.imatrix.entries_count": 224,
        "quantize.imatrix.dataset": "calibration.txt",
        "split.no": 0,
        "split.count": 1,
        "split.tensors.count": 9,
        "tokenizer.ggml.eot_token_id": 1,
        "tokenizer.ggml.eog_token_ids": [1, 2],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template.tool_use": "{{ messages }}",
        "llama.expert_count": 0,
        "llama.rope.scaling.finetuned": False,
        "somebody.version": "3",
    }
    plain, full = (
        load(write_gguf(tmp_path / f"{i}.gguf", metadata=e)) for i, e in enumerate([{}, entries])
    )
    assert plain.config == full.config and plain.fingerprint == full.fingerprint
    assert plain.tokenizer.encode("the train") == full.tokenizer.encode("the train")


@pytest.mark.parametrize("part", [0, 3, 20, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_a_gguf_file_that_is_cut_is_refused(tmp_path, part):
    content = gguf_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    message = refusal(path)
    assert f"{path} is not a complete GGUF file" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("name", "offset", "told"),
    [
        ("token_type", 8, f"a list of {2**60} values"),
        ("tokens", 8, f"a list of {2**60} values"),
        ("tokens", 16, "it ends inside the value at byte"),  # the first string's length
        ("merges", 16, "it ends inside the value at byte"),
    ],
)
def test_a_gguf_file_that_lies_about_a_length_does_not_hang(tmp_path, name, offset, told):
    content = gguf_bytes()
    at = content.index(f"tokenizer.ggml.{name}".encode()) + len(f"tokenizer.ggml.{name}") + offset
    path = tmp_path / "m.gguf"
    path.write_bytes(content[:at] + (2**60).to_bytes(8, "little") + content[at + 8 :])
    assert told in refusal(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"{}" * 50, bytes(1000)])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert f"{path} is not a complete GGUF file (GGUF magic invalid)" in refusal(path)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"general.architecture": "phi3"}, "GGUF architecture 'phi3' is not supported; supported"),
        ({"general.architecture": "qwen2moe"}, "'qwen2moe' is not supported (a mixture of experts"),
        ({"general.architecture": "qwen3moe"}, "'qwen3moe' is not supported (a mixture of experts"),
        ({"general.type": "adapter"}, "holds a GGUF 'adapter', not a model"),
        ({"split.count": 3}, "is one of 3 parts of a model; join them first"),
    ],
)
def test_another_kind_of_gguf_file_is_refused(tmp_path, metadata, told):
    assert told in refusal(write_gguf(tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not known"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 (a mixture of experts"),
        (
            {"llama.logit_scale": 2.0, "llama.pooling_type": 1},
            "llama.logit_scale = 2.0 is not known; llama.pooling_type = 1 is not known",
        ),
        ({"llama.attention.key_length": 12}, "the head sizes differ"),
        ({"llama.rope.dimension_count": 4}, "the head sizes differ"),
        (
            {"llama.attention.layer_norm_rms_epsilon": None, "llama.block_count": None},
            "llama.block_count is missing; llama.attention.layer_norm_rms_epsilon is missing",
        ),
        ({"llama.block_count": "three"}, "llama.block_count is 'three', not a positive integer"),
        ({"llama.attention.head_count": [4, 4, 4]}, "head_count is [4, 4, 4], not a positive"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, not a positive"),
    ],
)
def test_gguf_metadata_not_understood_are_named(tmp_path, metadata, told):
    assert told in refusal(write_gguf(tmp_path / "m.gguf", metadata=metadata))


def test_heads_that_do_not_divide_a_weight_are_told_by_reading(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": 3}))
    with pytest.raises(UserError, match="rows, which do not divide over 3 heads"):
        file.read(K_PROJ)


def test_an_unknown_gguf_tensor_is_named(tmp_path):
    extra = {"rope_factors_long.weight": np.ones(5, np.float32)}
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors=extra))
    assert "1 not known (rope_factors_long.weight)" in message


def test_a_tensor_under_two_names_is_refused(tmp_path):
    extra = {"model.norm.weight": np.ones(132, np.float32)}
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors=extra))
    assert "holds a weight under two names" in message


def test_divisors_that_do_not_fit_the_rope_are_refused(tmp_path):
    extra = {"rope_freqs.weight": np.arange(1, 8, dtype=np.float32)}
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors=extra))
    assert "does not give the frequencies of the tensor rope_freqs.weight" in message


def test_a_missing_gguf_tensor_is_named(tmp_path):
    message = refusal(write_gguf(tmp_path / "m.gguf", tensors={"blk.1.attn_k.weight": None}))
    assert f"1 missing ({K_PROJ})" in message


def test_a_gguf_tensor_of_integers_is_named(tmp_path):
    extra = {"blk.1.attn_k.weight": np.ones(shape_of(K_PROJ), np.int32)}
    path = write_gguf(tmp_path / "m.gguf", tensors=extra)
    assert f"1 unreadable ({K_PROJ} is of type I32" in refusal(path)
    with pytest.raises(UserError, match="which gguf cannot dequantize"):
        GgufFile(path).read(K_PROJ)


def test_every_weight_of_every_architecture_has_gguf_s_own_name():
    """Our tables agree with gguf's, also on names that no model of the tests has."""
    for architecture, family in GGUF_FAMILIES.items():
        kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, 9)
        for ours, theirs in family.tensor_names.items():
            name = names.get_name(theirs.replace("{layer}", "5"), (".weight", ".bias"))
            if name is None:  # gguf lists no untied head for Gemma
                assert architecture.startswith("gemma") and ours == "output.weight"
            else:
                assert name == ours.replace("{layer}", "5")
