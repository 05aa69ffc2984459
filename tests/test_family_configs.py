"""Every family's config: published sizes, agreement with transformers, and nothing unread."""

import copy
import json
from pathlib import Path

import family_models
import pytest
from transformers import CONFIG_MAPPING

from jaxgrad.errors import UserError
from jaxgrad.models.decoder import num_parameters
from jaxgrad.models.families import FAMILIES, ignored_attributes, read_config
from jaxgrad.models.families.attributes import IRRELEVANT
from jaxgrad.models.families.gpt import GPT2_IRRELEVANT

FOLDER = Path(__file__).parent
# The files of the hub, with the number of parameters that their publishers state.
PUBLISHED = json.loads((FOLDER / "published_configs.json").read_text(encoding="utf-8"))
MIXTURES = {name for name, entry in PUBLISHED.items() if entry["model_type"] not in FAMILIES}
DENSE = sorted(PUBLISHED.keys() - MIXTURES)


def read(raw):
    return read_config(copy.deepcopy(raw), "DIR/config.json")[1]


def refusal(raw):
    with pytest.raises(UserError) as caught:
        read(raw)
    message = str(caught.value)
    assert message.startswith("DIR/config.json: ") and "\n" not in message
    return message


# Published models


@pytest.mark.parametrize("name", DENSE)
def test_a_published_config_has_the_published_number_of_parameters(name):
    entry = PUBLISHED[name]
    assert num_parameters(read(entry["config"])) == entry["parameters"]


def test_every_published_config_is_of_a_family():
    # Gemma 3's text decoder occurs by itself and inside the multimodal model.
    assert {PUBLISHED[name]["model_type"] for name in DENSE} <= FAMILIES.keys()


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_a_mixture_of_experts_is_refused(name):
    message = refusal(PUBLISHED[name]["config"])
    assert "is a mixture of experts" in message and "router" in message
    assert f"'{PUBLISHED[name]['model_type']}'" in message


def test_a_number_of_experts_in_a_family_that_has_none_is_ignored():
    # Their weights would be unknown ones, which the files' check names.
    raw = PUBLISHED["Llama-2-7b"]["config"] | {"num_local_experts": 8}
    assert ignored_attributes(raw, "config.json") == ("num_local_experts",)


@pytest.mark.parametrize("name", DENSE)
def test_a_published_config_reads_as_transformers_reads_it(name):
    raw = PUBLISHED[name]["config"]
    ours = read(raw)
    theirs = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw)).get_text_config()
    assert ours.vocab_size == theirs.vocab_size
    assert ours.width == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    if raw["model_type"] == "gpt2":
        return
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", ours.num_heads)
    size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_size == size
    kinds = [ours.kinds[place] for place in ours.layer_kinds]
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    if types is None:
        assert {kind.window for kind in kinds} == {window}
    else:
        slides = [kind == "sliding_attention" for kind in types]
        assert [kind.window for kind in kinds] == [window if s else None for s in slides]
    for layer, kind in enumerate(kinds):
        rope = theirs.rope_parameters
        if "full_attention" in rope:
            rope = rope[types[layer]]
        if raw["model_type"] == "smollm3" and not theirs.no_rope_layers[layer]:
            assert kind.rope is None
            continue
        assert kind.rope.theta == rope["rope_theta"]
        assert kind.rope.kind == rope["rope_type"]
        assert kind.rope.rotated_fraction == rope.get("partial_rotary_factor", 1.0)


# Nothing is left unread

# Attributes besides `IRRELEVANT` that change no text decoder's arithmetic.
UNREAD = {
    "gpt2": {*GPT2_IRRELEVANT},
    "phi3": {"original_max_position_embeddings"},
    "gemma3": {
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
    },
}
# One config for each family, with all attributes that transformers writes.
FULL = {
    model.model_type: json.loads(
        family_models.build_config(model, 307).to_json_string(use_diff=False)
    )
    for model in family_models.MODELS.values()
}
ATTRIBUTES = [
    (model_type, name)
    for model_type, raw in FULL.items()
    for name in raw
    if name not in IRRELEVANT | UNREAD.get(model_type, set())
]


@pytest.mark.parametrize("model_type", FULL)
def test_a_config_with_all_attributes_is_understood(model_type):
    read(FULL[model_type])


@pytest.mark.parametrize(("model_type", "name"), ATTRIBUTES)
def test_nonsense_in_any_attribute_is_named(model_type, name):
    # transformers ignores what it does not know in a rope's object.
    nonsense = {"rope_type" if name == "rope_parameters" else "nonsense": 1}
    assert name in refusal(FULL[model_type] | {name: nonsense})


@pytest.mark.parametrize("model_type", UNREAD)
def test_what_is_listed_as_unread_changes_nothing(model_type):
    for name in UNREAD[model_type]:
        assert read(FULL[model_type] | {name: "anything"}) == read(FULL[model_type])


@pytest.mark.parametrize("model_type", FULL)
def test_another_class_of_the_family_is_refused(model_type):
    message = refusal(FULL[model_type] | {"architectures": ["SomeModelForTokenClassification"]})
    assert "SomeModelForTokenClassification" in message
    assert FAMILIES[model_type].architecture in message


@pytest.mark.parametrize("name", ["head_dim", "sliding_window", "rope_parameters", "layer_types"])
def test_nonsense_inside_a_multimodal_config_is_named(name):
    text = FULL["gemma3"]["text_config"] | {name: "x"}
    assert f"text_config.{name}" in refusal(FULL["gemma3"] | {"text_config": text})


@pytest.mark.parametrize("value", [None, [], 3])
def test_a_multimodal_config_without_text_is_refused(value):
    assert "text_config is " in refusal(FULL["gemma3"] | {"text_config": value})


# What single families do

PHI4 = PUBLISHED["Phi-4-mini-instruct"]["config"]


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("Qwen3-8B", {"max_window_layers": -1}, "max_window_layers is -1"),
        ("Qwen3-8B", {"layer_types": ["sliding_attention"] * 36}, "sliding_window is not given"),
        ("Qwen3-8B", {"layer_types": ["full_attention"] * 3}, "not a list of 36 of"),
        ("gemma-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma-2-2b", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("gemma-3-1b-pt", {"rope_parameters": {"full_attention": {}}}, "sliding_attention is miss"),
        (
            "phi-4",
            {"full_attn_mod": 2, "auto_map": {"AutoConfig": "x.Phi3Config"}},
            "full_attn_mod is 2; understood: 1",
        ),
        ("phi-4", {"auto_map": {"AutoConfig": "x.MyConfig"}}, "brings code of its own"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 2]}, "not a list of 36 of 0, 1"),
        ("granite-3.1-2b-instruct", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("pythia-1.4b", {"rotary_pct": 0.31}, "rotated part 39 of the head size 128 is odd"),
        ("pythia-1.4b", {"num_attention_heads": 7}, "width 2048 does not divide over 7 heads"),
        ("gpt2", {"n_embd": 7, "hidden_size": 768}, "hidden_size = 768 and n_embd = 7 contradict"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types = "),
    ],
)
def test_what_a_family_does_not_know_is_named(model, changes, told):
    raw = PUBLISHED[model]["config"] | changes
    assert told in refusal(raw)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"short_factor": [1.0] * 47}, "47 rope factors for 48 rotary pairs"),
        ({"long_factor": "x"}, "rope_scaling.long_factor is 'x', not a list of positive numbers"),
        ({"long_factor": [0.0] * 48}, "rope_scaling.long_factor is "),
        ({"type": "yarn"}, "rope_scaling.type is 'yarn'"),
        ({"max_position_embeddings": 9}, "rope_scaling.max_position_embeddings = 9 is not known"),
        ({"type": ["longrope"]}, "rope_scaling.type is ['longrope'], not one of"),
    ],
)
def test_a_longrope_not_understood_is_named(changes, told):
    assert told in refusal(PHI4 | {"rope_scaling": PHI4["rope_scaling"] | changes})


def test_a_longrope_that_stretches_one_position_is_refused():
    assert "is 1, which no stretch" in refusal(PHI4 | {"original_max_position_embeddings": 1})


def test_a_longrope_takes_its_magnitude_from_the_stretch():
    rope = read(PHI4).kinds[0].rope
    assert (rope.original_length, len(rope.short_factors), rope.rotated_fraction) == (
        4096,
        48,
        0.75,
    )
    # sqrt(1 + ln 32 / ln 4096), ln 32 / ln 4096 = 5 / 12.
    assert rope.magnitude == pytest.approx((17 / 12) ** 0.5, rel=1e-14)
    scaling = PHI4["rope_scaling"] | {"attention_factor": 1.25}
    assert read(PHI4 | {"rope_scaling": scaling}).kinds[0].rope.magnitude == 1.25
    old = PHI4 | {"rope_scaling": PHI4["rope_scaling"] | {"type": "su"}}
    assert read(old) == read(PHI4)


def test_a_window_that_is_not_switched_on_does_not_count():
    raw = PUBLISHED["Qwen2-1.5B"]["config"]
    assert {kind.window for kind in read(raw).kinds} == {None}
    used = read(raw | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 20})
    assert [used.kinds[k].window for k in used.layer_kinds] == [None] * 20 + [5] * 8


def test_gemma3_turns_local_and_global_layers_differently():
    config = read(PUBLISHED["gemma-3-4b-pt"]["config"])
    kinds = [config.kinds[place] for place in config.layer_kinds]
    assert [kind.window for kind in kinds[:6]] == [1024] * 5 + [None]
    assert (kinds[0].rope.theta, kinds[0].rope.kind) == (10_000.0, "default")
    assert (kinds[5].rope.theta, kinds[5].rope.kind, kinds[5].rope.factor) == (1e6, "linear", 8.0)


def test_smollm3_leaves_every_fourth_layer_unturned():
    config = read(PUBLISHED["SmolLM3-3B"]["config"])
    unturned = [config.kinds[place].rope is None for place in config.layer_kinds]
    assert unturned == [layer % 4 == 3 for layer in range(36)]
