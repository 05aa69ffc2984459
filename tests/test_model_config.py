"""config.json -> DecoderConfig: every generation is read right, and what is not understood is refused."""

import copy
import math
from typing import Any

import pytest
from transformers import LlamaConfig

from jaxgrad.errors import UserError
from jaxgrad.models import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.families import ignored_attributes, read_config
from jaxgrad.models.families.attributes import IRRELEVANT

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 23,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 67,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(raw: dict[str, Any]) -> DecoderConfig:
    return read_config(raw, "DIR/config.json")[1]


def changed(**changes: Any) -> dict[str, Any]:
    """RAW with other values; `...` removes an attribute."""
    return {name: value for name, value in (RAW | changes).items() if value is not ...}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(raw)
    message = str(caught.value)
    assert message.startswith("DIR/config.json: ")
    assert "\n" not in message
    return message


BASE = read(RAW)


# Reading agrees with transformers

AS_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "tiny": RAW,
    "no kv heads": changed(num_key_value_heads=...),
    "null kv heads": changed(num_key_value_heads=None),
    "no head_dim": changed(head_dim=..., hidden_size=24),
    "null head_dim": changed(head_dim=None, hidden_size=24),
    "no theta": changed(rope_theta=...),
    "no tying": changed(tie_word_embeddings=...),
    "biases": changed(attention_bias=True, mlp_bias=True),
    "linear, type": changed(rope_scaling={"type": "linear", "factor": 2.5}),
    "linear, rope_type": changed(rope_scaling={"rope_type": "linear", "factor": 2}),
    "rope_parameters": changed(
        rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 700.0}
    ),
    "rope_parameters, theta outside": changed(rope_parameters={"rope_type": "default"}),
    "rope_parameters, llama3": changed(
        rope_theta=..., rope_parameters=LLAMA3 | {"rope_theta": 700.0}
    ),
    "llama3 without original length": changed(
        rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    ),
    "empty rope_scaling": changed(rope_scaling={}),
}


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_reads_what_transformers_reads(name):
    ours = read(AS_TRANSFORMERS[name])
    # A copy: transformers writes into the nested objects.
    theirs = LlamaConfig.from_dict(copy.deepcopy(AS_TRANSFORMERS[name]))
    rope = theirs.rope_parameters
    expected = {
        "vocab_size": theirs.vocab_size,
        "width": theirs.hidden_size,
        "mlp_width": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_size": theirs.head_dim,
        "max_positions": theirs.max_position_embeddings,
        "activation": theirs.hidden_act,
        "norm_epsilon": theirs.rms_norm_eps,
        "qkv_bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
        "mlp_bias": theirs.mlp_bias,
        "tied_embeddings": theirs.tie_word_embeddings,
        "kinds": (
            AttentionKind(
                Rope(
                    rope["rope_theta"],
                    rope["rope_type"],
                    rope.get("factor", 1.0),
                    rope.get("low_freq_factor", 1.0),
                    rope.get("high_freq_factor", 1.0),
                    rope.get("original_max_position_embeddings", 1),
                )
            ),
        ),
        "layer_kinds": (0,) * theirs.num_hidden_layers,
    }
    assert ours == DecoderConfig(**expected)


def test_all_spellings_of_a_rope_are_one():
    old = {"type": "linear", "factor": 3.0}
    new = {"rope_type": "linear", "factor": 3.0}
    spellings = [
        changed(rope_scaling=old),
        changed(rope_scaling=new),
        changed(rope_scaling=old | new),
        changed(rope_parameters=new),
        changed(rope_theta=..., rope_parameters=new | {"rope_theta": 500.0}),
        changed(rope_parameters=new | {"rope_theta": 500}, rope_scaling=old),
    ]
    assert {read(raw).kinds[0].rope for raw in spellings} == {Rope(500.0, "linear", 3.0)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"rope_parameters": {"rope_theta": 700.0}},
            ["rope_parameters.rope_theta = 700.0 and rope_theta = 500.0 contradict each other"],
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            ["rope_scaling and rope_parameters contradict each other"],
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            ["rope_scaling.rope_type = 'llama3' and rope_scaling.type = 'linear' contradict"],
        ),
    ],
)
def test_ropes_that_contradict_themselves_are_refused(changes, told):
    message = refusal(changed(**changes))
    assert all(part in message for part in told), message


YARN = {"factor": 4.0, "beta_fast": 32, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("yarn", YARN),
        ("dynamic", {"factor": 2.0}),
        ("mrope", {"mrope_section": [1, 2]}),
        ("proportional", {"short_factor": [1.0]}),
        (None, {"factor": 2.0}),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_ropes_not_understood_are_named(name, key, kind, rest):
    message = refusal(changed(**{name: {key: kind, **rest}}))
    shown = "null" if kind is None else repr(kind)
    assert f"{name}.{key} is {shown}, not one of default, linear, llama3, longrope" in message
    assert all(f"{name}.{attribute} = " in message for attribute in rest), message


@pytest.mark.parametrize("value", ["linear", [1], 2.0, True])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_rope_that_is_no_object_is_refused(name, value):
    assert f"{name} is {value!r}, not an object" in refusal(changed(**{name: value}))


def test_a_rope_for_each_layer_type_is_refused():
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    message = refusal(changed(rope_parameters=nested))
    assert "rope_parameters.full_attention is an object" in message
    assert "rope_parameters.sliding_attention is an object" in message


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", ["8", True, None, 0, -1.0, math.nan, math.inf, 10**400, [8.0]])
def test_a_rope_s_number_that_is_none_is_named(name, value):
    message = refusal(changed(rope_scaling=LLAMA3 | {name: value}))
    assert f"rope_scaling.{name} is " in message
    assert "not a positive number" in message


def test_a_rope_without_its_numbers_names_them():
    message = refusal(changed(rope_scaling={"rope_type": "llama3"}))
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        assert f"rope_scaling.{name} is missing" in message


def test_llama3_rope_needs_room_between_its_factors():
    message = refusal(changed(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}))
    assert "low frequency factor 1.0 is not below its high one 1.0" in message


# What transformers reads and is not understood is refused; test_config_reads.py has what it does not


@pytest.mark.parametrize("value", [3, 0, None, False, {}, "x"])
def test_what_transformers_does_not_read_is_ignored(value):
    raw = changed(logit_scale=value)
    assert read(raw) == BASE
    assert ignored_attributes(raw, "c") == ("logit_scale",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretraining_tp", 2),
        ("pretraining_tp", None),
        ("is_encoder_decoder", True),
        ("is_causal", False),
        ("chunk_size_feed_forward", 16),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}),
        ("per_layer_config", {"0": {"rms_norm_eps": 1.0}}),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_attributes_off_their_neutral_value_are_named(name, value):
    message = refusal(changed(**{name: value}))
    assert name in message
    assert ("null" if value is None else repr(value)) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretraining_tp", 1),
        ("is_encoder_decoder", False),
        ("is_causal", True),
        ("chunk_size_feed_forward", 0),
        ("problem_type", None),
        ("quantization_config", None),
        ("auto_map", None),
        ("rope_scaling", None),
        ("architectures", None),
        ("architectures", []),
        ("architectures", "LlamaForCausalLM"),
        ("original_max_position_embeddings", 32),  # only scaled ropes use it
    ],
)
def test_neutral_values_change_nothing(name, value):
    assert read(changed(**{name: value})) == BASE


@pytest.mark.parametrize("name", sorted(IRRELEVANT - {"model_type"}))
def test_irrelevant_attributes_change_nothing(name):
    assert read(changed(**{name: "anything"})) == BASE


def test_no_attribute_that_is_read_counts_as_irrelevant():
    read_ones = RAW.keys() | {"attention_bias", "mlp_bias", "rope_scaling", "rope_parameters"}
    assert not (read_ones - {"model_type"}) & IRRELEVANT


COUNTS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
NUMBERS = ["rms_norm_eps", "rope_theta"]
SWITCHES = ["attention_bias", "mlp_bias", "tie_word_embeddings"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["6", True, 6.5, 0, -6, 2**31, [6], {}])
def test_counts_that_are_none_are_named(name, value):
    expected = f"{name} is {value!r}, not a positive whole number"
    assert expected in refusal(changed(**{name: value}))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1e-5", True, None, 0, -1.0, math.nan, math.inf, [1.0]])
def test_numbers_that_are_none_are_named(name, value):
    shown = "null" if value is None else repr(value)
    assert f"{name} is {shown}, not a positive number" in refusal(changed(**{name: value}))


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_switches_that_are_none_are_named(name, value):
    assert f"{name} is {value!r}, not true or false" in refusal(changed(**{name: value}))


@pytest.mark.parametrize("value", ["tanh", None, 3, ["silu"], ""])
def test_an_activation_that_is_unknown_is_named(value):
    message = refusal(changed(hidden_act=value))
    assert "hidden_act is " in message and "silu" in message and "gelu_pytorch_tanh" in message


@pytest.mark.parametrize(
    "name", [*COUNTS[:5], "max_position_embeddings", "hidden_act", "rms_norm_eps"]
)
def test_missing_attributes_are_named(name):
    message = refusal(changed(**{name: ...}))
    assert f"{name} is missing" in message
    assert message.count(" is ") == 1, "a missing attribute must not cause other complaints"


def test_all_problems_stand_in_one_error():
    message = refusal(
        changed(
            architectures=["LlamaForTokenClassification"],
            pretraining_tp=2,
            vocab_size="31",
            hidden_act="tanh",
            rms_norm_eps=...,
            rope_scaling={"type": "yarn", "factor": 2.0},
            is_causal=False,
            quantization_config={"quant_method": "gptq"},
        )
    )
    for part in (
        "LlamaForTokenClassification",
        "pretraining_tp",
        "vocab_size",
        "hidden_act",
        "rms_norm_eps",
        "yarn",
        "is_causal",
        "gptq",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_key_value_heads": 3}, "4 query heads do not divide over 3 kv heads"),
        ({"head_dim": 5}, "head size 5 is odd"),
        ({"head_dim": ..., "hidden_size": 22}, "width 22 does not divide over 4 heads"),
    ],
)
def test_sizes_that_no_model_has_are_refused(changes, told):
    assert told in refusal(changed(**changes))


@pytest.mark.parametrize("value", ["qwen9", "Llama", "", ["llama"], 3])
def test_an_unsupported_model_type_lists_the_supported_ones(value):
    message = refusal(changed(model_type=value))
    assert repr(value) in message
    assert "supported family: llama (LlamaForCausalLM)" in message


@pytest.mark.parametrize("changes", [{"model_type": ...}, {"model_type": None}])
def test_no_model_type_lists_the_supported_ones(changes):
    message = refusal(changed(**changes))
    assert "no model_type" in message
    assert "llama (LlamaForCausalLM)" in message


def test_long_values_are_cut_in_messages():
    assert len(refusal(changed(is_causal={"a": ["b" * 50] * 50}))) < 400
