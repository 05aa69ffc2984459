"""What a config.json may say without being understood: what transformers does not read.

That it does not is shown on transformers' own models, too: the logits stay the same.
"""

import copy
import json
import os
from pathlib import Path

import family_models
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from jaxgrad.checkpoints import open_checkpoint
from jaxgrad.errors import UserError
from jaxgrad.models.families import FAMILIES, config_notes, ignored_attributes, read_config, reads
from jaxgrad.models.families.attributes import Attributes
from jaxgrad.models.families.reads import FILE, merge_reads, reads_of, rules_for
from jaxgrad.models.families.transformers_source import read_source

FULL = {
    model.model_type: json.loads(
        family_models.build_config(model, 307).to_json_string(use_diff=False)
    )
    for model in family_models.MODELS.values()
}
SOURCE = Path(transformers.__file__).parent
LISTED = json.loads(FILE.read_text("utf-8"))
# A GPT-NeoX as transformers 4.57 writes it: theta and the rotated fraction twice.
NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_bias": True,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 1000,
}


def meaning(raw):
    return read_config(copy.deepcopy(raw), "DIR/config.json")[1]


def refusal(raw):
    with pytest.raises(UserError) as caught:
        meaning(raw)
    message = str(caught.value)
    assert message.startswith("DIR/config.json: ") and "\n" not in message
    return message


# What is ignored

UNREAD = [
    ("llama", {"_model_name_or_path": "x", "_num_labels": 2, "output_past": True}),
    ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 3}),
    ("llama", {"rope_interleaved": True, "is_llama_config": False, "num_local_experts": 8}),
    ("mistral", {"use_sliding_window": False, "attention_bias": True, "max_window_layers": 1}),
    ("gpt_neox", {"num_key_value_heads": 2, "_num_labels": 2}),
    ("gpt2", {"n_ctx": 9, "rope_theta": 3.0, "sliding_window": 2, "intermediate_size": 5}),
    ("qwen2", {"use_mrope": True, "attention_bias": False, "mlp_bias": True}),
    ("gemma2", {"sliding_window_size": 2, "hidden_act": "relu"}),
]


@pytest.mark.parametrize(("model_type", "extra"), UNREAD)
def test_what_transformers_does_not_read_is_ignored_and_changes_no_logit(
    model_type, extra, tmp_path
):
    raw = FULL[model_type]
    assert meaning(raw | extra) == meaning(raw)
    assert set(ignored_attributes(raw | extra, "config.json")) == extra.keys()
    assert ignored_attributes(raw, "config.json") == ()
    assert torch.equal(logits(raw | extra, tmp_path), logits(raw, tmp_path))


def test_the_logits_see_what_is_read(tmp_path):
    # The control of the test above: the same check finds a difference.
    raw = FULL["llama"]
    assert not torch.equal(logits(raw | {"is_causal": False}, tmp_path), logits(raw, tmp_path))
    assert "is_causal = False; understood: True" in refusal(raw | {"is_causal": False})


def logits(raw, folder):
    """Of a model with the same random weights for the same shapes, on tokens longer than any window."""
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        return model(torch.arange(29)[None]).logits


@pytest.mark.parametrize("model_type", FULL)
def test_an_attribute_of_another_tool_is_named_in_one_line(model_type):
    (line,) = config_notes(FULL[model_type] | {"some_new_switch": True}, "config.json")
    assert line == (
        f"config: ignored, because transformers does not read them for {model_type}: some_new_switch"
    )
    assert config_notes(FULL[model_type], "config.json") == ()


def test_a_note_is_one_printable_line_however_many_and_odd_the_names_are():
    odd = {"a\nb": 1, "\x1b[31m": 2, "x" * 5000: 3}
    (line,) = config_notes(FULL["llama"] | odd | {f"n{i}": i for i in range(99)}, "config.json")
    assert line.isprintable() and len(line) < 1500 and line.endswith(" and 62 more")


def test_what_is_ignored_is_said_of_an_open_checkpoint(tmp_path):
    model = family_models.MODELS["mistral_gqa"]
    path = family_models.save_model(model, tmp_path)
    raw = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(raw | {"use_sliding_window": False}), "utf-8")
    assert (
        config_notes(raw | {"use_sliding_window": False}, "c") == open_checkpoint(str(path)).notes
    )


def test_an_ignored_key_of_a_rope_is_named():
    rope = {"rope_type": "default", "factor": 8.0, "mscale": 1.0, "rope_theta": 1000.0}
    raw = FULL["llama"] | {"rope_parameters": None, "rope_scaling": rope}
    assert ignored_attributes(raw, "c") == ("rope_scaling.factor", "rope_scaling.mscale")
    assert meaning(raw).kinds[0].rope.factor == 1.0
    assert meaning(raw).kinds[0].rope.theta == 1000.0


def test_what_is_ignored_in_the_text_of_a_multimodal_config_is_named():
    raw = FULL["gemma3"]
    text = raw["text_config"] | {"use_sliding_window": False}
    ignored = ignored_attributes(raw | {"text_config": text, "n_ctx": 3}, "c")
    assert set(ignored) == {"text_config.use_sliding_window", "n_ctx"}


# What is read, and refused


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"pruned_heads": {"0": [1]}}),
        ("llama", {"torchscript": True}),
        ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}),
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": {"rope_theta": 1.0, "full_attention": {"rope_theta": 2.0}}}),
        ("mistral", {"layer_types": ["full_attention"] * 3}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"is_encoder_decoder": True}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gpt_neox", {"head_dim": 5}),
        ("qwen2", {"quantization_config": {"bits": 4}}),
        ("qwen2", {"auto_map": {"AutoConfig": "x.Config"}}),
        ("gemma3", {"tie_word_embeddings": False}),
    ],
)
def test_what_transformers_reads_and_is_not_understood_is_named(model_type, extra):
    message = refusal(FULL[model_type] | extra)
    assert next(iter(extra)) in message
    # The mend: without it the file is read.
    meaning(FULL[model_type])


@pytest.mark.parametrize("model_type", FULL)
def test_the_readers_read_nothing_that_transformers_does_not(model_type):
    attributes = Attributes(FULL[model_type], "c", rules_for(model_type, None))
    FAMILIES[model_type].read_fields(attributes)
    # Microsoft's published Phi-3 files name code, which is checked to be Microsoft's.
    assert attributes._read - {"auto_map"} <= reads_of(model_type).names


def test_a_file_by_a_newer_transformers_may_read_what_is_not_known():
    raw = FULL["llama"] | {"some_new_switch": True}
    assert "some_new_switch" not in refusal_or_empty(
        raw | {"transformers_version": reads_of("llama").newest}
    )
    for version in ("99.0.0", "99.1.0.dev0"):
        message = refusal(raw | {"transformers_version": version})
        assert "some_new_switch = True is not known" in message
        assert f"transformers {version} wrote the file" in message and "upgrade" in message
        meaning(FULL["llama"] | {"transformers_version": version})
    for version in ("nonsense", None, 3, "9" * 5000):
        meaning(raw | {"transformers_version": version})


def refusal_or_empty(raw):
    try:
        meaning(raw)
    except UserError as error:
        return str(error)
    return ""


# The same number under two names


def test_a_config_of_gpt_neox_by_4_57_reads_as_without_the_doubled_keys():
    single = {k: v for k, v in NEOX.items() if k not in ("partial_rotary_factor", "rope_theta")}
    assert meaning(NEOX) == meaning(single)
    assert meaning(NEOX).kinds[0].rope.rotated_fraction == 0.25
    assert ignored_attributes(NEOX, "c") == ()


@pytest.mark.parametrize(
    ("read", "repeated", "value"),
    [("rotary_pct", "partial_rotary_factor", 0.5), ("rotary_emb_base", "rope_theta", 700)],
)
def test_what_transformers_only_repeats_is_no_value_of_its_own(read, repeated, value):
    # transformers takes its default where only the repetition is there.
    raw = {name: one for name, one in NEOX.items() if name != read} | {repeated: value}
    theirs = transformers.GPTNeoXConfig.from_dict(copy.deepcopy(raw)).rope_parameters
    assert (theirs["rope_theta"], theirs["partial_rotary_factor"]) == (10000, 0.25)
    assert f"the default of {read} = " in refusal(
        raw
    ) and f"{repeated} = {float(value)}" in refusal(raw)
    assert meaning(raw | {read: value}) != meaning(NEOX)


def test_the_shared_case_of_gpt_neox_is_read():
    shared = os.environ.get("JAXGRAD_SHARED")
    path = Path(shared or "") / "cases" / "pythia_config_saved_by_4.57.json"
    if not shared or not path.is_file():
        pytest.skip("needs $JAXGRAD_SHARED/cases")
    raw = json.loads(path.read_text("utf-8"))
    for doubled in ("partial_rotary_factor", "rope_theta"):
        assert meaning(raw) == meaning({k: v for k, v in raw.items() if k != doubled})


@pytest.mark.parametrize(
    ("raw", "doubled", "wrong"),
    [
        (NEOX, "rope_theta", 5000.0),
        (NEOX, "partial_rotary_factor", 0.5),
        (FULL["gpt2"] | {"num_hidden_layers": 3}, "num_hidden_layers", 2),
        (
            FULL["llama"] | {"rope_theta": FULL["llama"]["rope_parameters"]["rope_theta"]},
            "rope_theta",
            7.0,
        ),
        (
            FULL["gemma3_text"] | {"rope_local_base_freq": 70.0},
            "rope_local_base_freq",
            71.0,
        ),
        (
            FULL["llama"]
            | {
                "rope_parameters": family_models.LLAMA3,
                "original_max_position_embeddings": family_models.LLAMA3[
                    "original_max_position_embeddings"
                ],
            },
            "original_max_position_embeddings",
            7,
        ),
    ],
)
def test_doubles_that_contradict_each_other_are_refused_and_removing_one_mends_it(
    raw, doubled, wrong
):
    single = {name: value for name, value in raw.items() if name != doubled}
    assert meaning(raw) == meaning(single)
    message = refusal(raw | {doubled: wrong})
    assert doubled in message and "contradict each other (remove the wrong one)" in message


@pytest.mark.parametrize(
    ("scaling", "same"),
    [
        ({"rope_type": "default"}, None),
        ({"type": "default", "factor": 4.0}, None),
        ({}, None),
        ({"type": "linear", "rope_type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000},
            {"type": "linear", "factor": 2},
        ),
        (
            {**family_models.LLAMA3, "original_max_position_embeddings": 32.0},
            {**family_models.LLAMA3, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_ropes_that_mean_the_same(scaling, same):
    raw = {k: v for k, v in FULL["llama"].items() if k != "rope_parameters"}
    theta = (same or {}).get("rope_theta", 10000.0)
    raw |= {"rope_theta": theta}
    scaling = scaling | ({"rope_theta": theta} if "rope_theta" in scaling else {})
    assert meaning(raw | {"rope_scaling": scaling}) == meaning(raw | {"rope_scaling": same})
    # transformers 5 has the theta inside.
    inside = {**(same or {}), "rope_theta": theta}
    assert meaning(raw | {"rope_parameters": inside}) == meaning(raw | {"rope_scaling": same})


def test_two_kinds_of_rope_in_one_file_are_refused():
    raw = FULL["llama"] | {"rope_parameters": None}
    both = {"type": "linear", "rope_type": "default", "factor": 2.0}
    message = refusal(raw | {"rope_scaling": both})
    assert (
        "rope_scaling.rope_type = 'default' and rope_scaling.type = 'linear' contradict" in message
    )
    unnamed = {"type": "linear", "rope_type": None, "factor": 2.0}
    assert "rope_scaling.rope_type is null" in refusal(raw | {"rope_scaling": unnamed})
    meaning(raw | {"rope_scaling": {"type": None, "rope_type": "linear", "factor": 2.0}})
    other = {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    message = refusal(raw | other | {"rope_parameters": {"rope_theta": 10000.0}})
    assert "rope_scaling and rope_parameters contradict each other" in message


# Numbers and null


def test_whole_numbers_may_be_written_as_floats():
    raw = FULL["qwen3"]
    floats = {k: float(v) for k, v in raw.items() if type(v) is int and "token_id" not in k}
    assert len(floats) > 8
    assert meaning(raw | floats) == meaning(raw)
    assert "hidden_size is 52.5, not a positive whole number" in refusal(
        raw | {"hidden_size": 52.5}
    )


def test_null_is_no_value_where_transformers_takes_it_so():
    raw = {k: v for k, v in FULL["llama"].items() if k != "rope_parameters"}
    nothing = dict.fromkeys(
        (
            "rope_scaling",
            "rope_parameters",
            "partial_rotary_factor",
            "num_key_value_heads",
            "head_dim",
        )
    )
    absent = {k: v for k, v in raw.items() if k not in nothing} | {"hidden_size": 56}
    assert meaning(absent | nothing) == meaning(absent)
    assert meaning(absent | {"attention_bias": None}) == meaning(absent | {"attention_bias": False})
    assert "rope_theta is null, not a positive number" in refusal(raw | {"rope_theta": None})
    inside = {"rope_theta": 10000.0, "partial_rotary_factor": None}
    assert "partial_rotary_factor is null" in refusal(raw | {"rope_parameters": inside})
    assert "hidden_size is null" in refusal(raw | {"hidden_size": None})
    assert "use_parallel_residual is null" in refusal(NEOX | {"use_parallel_residual": None})


# The class


@pytest.mark.parametrize("model_type", FULL)
def test_a_prefix_of_the_class_changes_nothing(model_type):
    raw, name = FULL[model_type], FAMILIES[model_type].architecture
    for named in ([f"FSDP{name}"], [name, f"Peft{name}"], f"FSDP{name}", [], None):
        assert meaning(raw | {"architectures": named}) == meaning(raw)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (["LlamaForSequenceClassification"], "architectures has 'LlamaForSequenceClassification'"),
        (["LlamaForCausalLM", "MistralForCausalLM"], "architectures has 'MistralForCausalLM'"),
        ([3], "architectures has 3"),
        ([["LlamaForCausalLM"]], "architectures has ['LlamaForCausalLM']"),
        ({"LlamaForCausalLM": 1}, "architectures has {"),
        (["LLaMAForCausalLM"], "architectures has 'LLaMAForCausalLM'"),
        (["LlamaModel"], "'LlamaModel', a decoder without lm_head (tie_word_embeddings is false)"),
        ([""], "architectures has ''"),
    ],
)
def test_another_class_is_named(named, told):
    raw = FULL["llama"] | {"tie_word_embeddings": False}
    message = refusal(raw | {"architectures": named})
    assert told in message and "understood: LlamaForCausalLM" in message


def test_a_decoder_without_a_head_is_whole_if_the_head_is_tied():
    raw = FULL["llama"] | {"tie_word_embeddings": True}
    assert meaning(raw | {"architectures": ["LlamaModel"]}) == meaning(raw)


# The list


def test_the_list_has_every_family_and_no_old_one():
    assert LISTED["model_types"].keys() == FAMILIES.keys()
    assert {version.split(".")[0] for version in LISTED["versions"]} == {"4", "5"}


def test_the_list_is_what_the_installed_source_gives_if_it_is_of_that_version():
    if transformers.__version__ not in LISTED["versions"]:
        pytest.skip(
            "the installed transformers is not in the list; it is searched when it is needed"
        )
    some = ("llama", "gemma3", "gpt_neox", "gpt2")
    found = merge_reads({transformers.__version__: {k: read_source(SOURCE, k) for k in some}})
    for model_type in some:
        assert found["model_types"][model_type].keys() <= LISTED["model_types"][model_type].keys()
    assert found["everywhere"].keys() <= LISTED["everywhere"].keys()
    assert set(found["generation"]) <= set(LISTED["generation"])


def test_a_version_that_is_not_in_the_list_is_searched(monkeypatch, tmp_path):
    listed = LISTED | {"versions": [v for v in LISTED["versions"] if v != transformers.__version__]}
    listed["model_types"] = {name: {} for name in FAMILIES}
    (tmp_path / "list.json").write_text(json.dumps(listed), "utf-8")
    monkeypatch.setattr(reads, "FILE", tmp_path / "list.json")
    found = reads.reads_of.__wrapped__("llama")
    assert {"hidden_size", "rms_norm_eps", "is_causal", "rope_parameters"} <= found.names
    assert "layer_types" not in found.names and found.newest == transformers.__version__


CONFIGURATION = """
class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    attribute_map = {"second_name": "field"}
    field: int = 3
    bounded: float = interval(min=0.0)(default=0.5)
    shared: ClassVar[int] = 1

    def __post_init__(self, **kwargs):
        self.given = kwargs.pop("keyword", True)
        if self.read_by_self is None or "asked" in kwargs:
            pass

    def validate_architecture(self):
        if self.only_checked:
            raise ValueError
"""
OLD_CONFIGURATION = """
class OldConfig(PretrainedConfig):
    model_type = "old"

    def __init__(self, parameter=5, other=None, *, last=(1, 2), **kwargs):
        super().__init__(**kwargs)
"""
MODELING = """
from ...masking_utils import make_mask

class ToyModel:
    def __init__(self, config, **kwargs):
        self.a = config.plain + self.config.nested + config.get_text_config().of_text
        self.b = getattr(config, "maybe", 7)
        kwargs.pop("not_of_the_config", None)
        config.method()
        self.c = self.not_the_config
        self.d = config.rope_parameters["key_of_rope"]
"""
MASKS = """
def make_mask(config):
    return inner(config)

def inner(config):
    return config.of_mask

def other_mask(config):
    return config.of_another_mask
"""


def test_the_source_is_searched_as_the_docstring_says(tmp_path):
    for name, text in {
        "models/toy/configuration_toy.py": CONFIGURATION,
        "models/toy/modeling_toy.py": MODELING,
        "models/old/configuration_old.py": OLD_CONFIGURATION,
        "masking_utils.py": MASKS,
        "modeling_rope_utils.py": 'ROPE_INIT_FUNCTIONS = {"bent": bend}\ndef bend(config):\n'
        '    return config.rope_parameters["angle"]\n',
        "modeling_utils.py": "def build(config):\n    return config.of_all_models\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    found = read_source(tmp_path, "toy")
    assert found.attributes == {
        "second_name": [],
        "field": [3],
        "bounded": [0.5],
        "keyword": [True],
        "read_by_self": [],
        "asked": [],
        "plain": [],
        "nested": [],
        "of_text": [],
        "maybe": [7],
        "rope_parameters": [],
        "rope.key_of_rope": [],
        "of_mask": [],
    }
    assert found.everywhere == {"of_all_models": []}
    assert found.ropes == {"bent": ["angle", "rope_parameters"]}
    old = read_source(tmp_path, "old").attributes
    assert old == {"parameter": [5], "other": [None], "last": [[1, 2]]}
    assert read_source(tmp_path, "missing") is None
    merged = merge_reads({"1.0": {"toy": found}, "1.10": {"toy": found}})
    assert merged["versions"] == ["1.0", "1.10"]
