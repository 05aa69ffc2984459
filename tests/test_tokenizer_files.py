"""Tokens are those of tokenizer.json: held against the `tokenizers` object that the file comes from."""

import inspect
import json

import pytest
import tokenizer_kinds
from tokenizer_kinds import BOS, EOS, HARD_TEXTS, KINDS
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from jaxgrad.checkpoints.tokenizer import tokenizer_from_directory
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import tokenize
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.compare import check_tokens
from jaxgrad.reference.encoding import encode_example
from jaxgrad.reference.tokenizer import FileTokenizer, reference_tokenizer

TURNS = [{"role": "user", "content": "how  long?"}]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A kind, and its directory as the program reads it."""
    kind = KINDS[request.param]()
    return kind, kind.write(tmp_path_factory.mktemp("kind") / request.param)


def test_ids_and_offsets_are_those_of_the_file(pair):
    kind, directory = pair
    loaded = tokenizer_from_directory(directory)
    assert loaded.rule == "tokenizer.json"
    for text in HARD_TEXTS:
        expected = kind.backend.encode(text)
        found = loaded.tokenizer(text, return_offsets_mapping=True)
        assert found["input_ids"] == loaded.tokenizer.encode(text) == expected.ids, text
        assert found["offset_mapping"] == expected.offsets, text
        bare = loaded.tokenizer.encode(text, add_special_tokens=False)
        assert bare == kind.backend.encode(text, add_special_tokens=False).ids, text
        cut = loaded.tokenizer.encode(text, truncation=True, max_length=5)
        assert len(cut) <= 5 and loaded.tokenizer.encode(text) == expected.ids, text


def test_the_pipeline_is_the_file_s_to_the_letter(pair):
    _, directory = pair
    loaded = tokenizer_from_directory(directory).tokenizer
    written = json.loads((directory / "tokenizer.json").read_text())
    kept = json.loads(loaded.backend_tokenizer.to_str())
    if kept["model"]["type"] == "Unigram":  # whose scores change in their last digit
        scores, expected = (dict(model.pop("vocab")) for model in (kept["model"], written["model"]))
        assert scores == pytest.approx(expected, rel=1e-15)
    assert kept == written


def test_the_reference_reads_the_same_ids_by_itself(pair):
    kind, directory = pair
    reference, ours = FileTokenizer(directory), tokenizer_from_directory(directory).tokenizer
    for text in HARD_TEXTS[::3]:
        assert reference.encode(text) == kind.backend.encode(text).ids
        cut = {"truncation": True, "max_length": 7}
        assert reference.encode(text, **cut) == ours.encode(text, **cut)
    rendered = [
        tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        for tokenizer in (reference, ours)
    ]
    assert rendered[0] == rendered[1] and "how  long?" in rendered[0]


RECORDS = ("leaves at  1234,\n", "waits  56 hours"), ("<|mark|>a  7", " 89\n  "), ("x", "y" * 90)


@pytest.mark.parametrize("protocol", ["paper", "clean"])
@pytest.mark.parametrize("kind", ["smollm", "llama2"])
def test_a_fault_in_our_tokens_shows_in_the_comparison(tmp_path, kind, protocol):
    """The reference's ids equal ours; those of transformers' own class do not."""
    directory = KINDS[kind]().write(tmp_path / "d")
    examples = [
        Example(i, str(i), (Message("user", text),), response)
        for i, (text, response) in enumerate(RECORDS)
    ]
    options = AnalyzeOptions(protocol=protocol, max_length=48)
    reference, which = reference_tokenizer(directory, None)
    assert which == "reference: tokens by tokenizer.json, read by itself"
    ours = tokenizer_from_directory(directory).tokenizer
    by_class = AutoTokenizer.from_pretrained(str(directory))
    wrong = 0
    for example in examples:
        expected = encode_example(example, reference, options)
        check_tokens(tokenize(example, ours, options.protocol_for(ours)), expected)
        faulty = tokenize(example, by_class, options.protocol_for(by_class))
        wrong += faulty.token_ids.tolist() != expected.token_ids
    assert wrong


def test_the_reference_says_where_it_has_no_tokens_of_its_own(tmp_path):
    (tmp_path / "m.gguf").touch()
    ours = object()
    found = reference_tokenizer(tmp_path / "m.gguf", ours)
    assert found == (ours, "reference: the same tokenizer, because a GGUF file has no other")
    found = reference_tokenizer(tmp_path, ours)
    assert found[0] is ours and "a model without tokenizer.json has no other" in found[1]


def test_every_part_of_the_tokenizers_library_has_a_kind():
    used = {}
    for kind in KINDS.values():
        file = json.loads(kind().backend.to_str())
        for section in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            used.setdefault(section, set()).update(_types(file[section]))
    for section, module, base in (
        ("normalizer", normalizers, normalizers.Normalizer),
        ("pre_tokenizer", pre_tokenizers, pre_tokenizers.PreTokenizer),
        ("post_processor", processors, processors.PostProcessor),
        ("decoder", decoders, decoders.Decoder),
    ):
        there = {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, base) and value is not base
        }
        assert there - used[section] == set(), section


def _types(part):
    if isinstance(part, dict):
        yield from [part["type"]] if "type" in part else []
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)


# Sections that cut and pad


@pytest.mark.parametrize("kind", ["smollm", "llama2", "roberta"])
def test_the_file_s_own_truncation_and_padding_touch_no_text(tmp_path, kind):
    kind = KINDS[kind]()
    expected = [kind.backend.encode(text).ids for text in HARD_TEXTS]
    kind.backend.enable_truncation(4, stride=1)
    kind.backend.enable_padding(length=50, pad_id=1, pad_token=EOS)
    directory = kind.write(tmp_path / "d")
    for tokenizer in (tokenizer_from_directory(directory).tokenizer, FileTokenizer(directory)):
        assert [tokenizer.encode(text) for text in HARD_TEXTS] == expected


def test_a_side_of_truncation_is_read_from_where_transformers_reads_it(tmp_path):
    kind = KINDS["smollm"]()
    kind.backend.enable_truncation(4, direction="left")
    left = kind.write(tmp_path / "left")
    right = kind.write(tmp_path / "right", truncation_side="right")
    for read in (lambda d: tokenizer_from_directory(d).tokenizer, FileTokenizer):
        assert read(left).truncation_side == "left" and read(right).truncation_side == "right"


# What other files say


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("smollm", {"add_bos_token": True}, "add_bos_token = true, tokenizer.json adds no '<s>'"),
        ("llama2", {"add_bos_token": False}, "add_bos_token = false, tokenizer.json adds '<s>'"),
        ("llama2", {"add_eos_token": True}, "add_eos_token = true, tokenizer.json adds no '</s>'"),
        ("t5", {"add_eos_token": False}, "add_eos_token = false, tokenizer.json adds '</s>'"),
        ("yi", {}, "add_prefix_space = true, tokenizer.json puts no space"),
        ("roberta", {}, "add_prefix_space = false, tokenizer.json puts a space"),
        ("smollm", {"split_special_tokens": True}, "takes special tokens in a text whole"),
        ("tekken", {"fix_mistral_regex": True}, "keeps its splitting rule"),
        ("smollm", {"pad_token": "<pad>"}, "does not have '<pad>' (in tokenizer_config.json)"),
        (
            "smollm",
            {"added_tokens_decoder": {"5": {"content": BOS}}},
            "gives '<s>' (in tokenizer_config.json) another id, which counts",
        ),
        (
            "phi3",
            {"added_tokens_decoder": {}, "decoder_of": "<|mark|>"},
            "says otherwise how '<|mark|>' (in tokenizer_config.json) is found",
        ),
    ],
)
def test_a_contradiction_is_said_and_the_file_counts(tmp_path, kind, changes, told):
    kind = KINDS[kind]()
    mark = changes.get("decoder_of")
    if mark is not None:
        entry = {"content": mark, "rstrip": False, "special": True}
        changes = {"added_tokens_decoder": {str(kind.backend.token_to_id(mark)): entry}}
    loaded = tokenizer_from_directory(kind.write(tmp_path / "d", **changes))
    assert [note for note in loaded.notes if told in note], loaded.notes
    assert loaded.lines()[0] == "tokens by tokenizer.json"
    for text in HARD_TEXTS:
        assert loaded.tokenizer.encode(text) == kind.backend.encode(text).ids


@pytest.mark.parametrize("kind", ["smollm", "llama3", "llama2", "gemma", "tekken", "bert"])
def test_what_agrees_is_not_said(tmp_path, kind):
    kind = KINDS[kind]()
    written = {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "normalized": token.normalized,
            "special": token.special,
        }
        for token_id, token in kind.backend.get_added_tokens_decoder().items()
    }
    starts = kind.backend.encode("a").tokens[0] == BOS
    changes = {"added_tokens_decoder": written, "add_bos_token": starts, "add_eos_token": False}
    assert tokenizer_from_directory(kind.write(tmp_path / "d", **changes)).notes == ()


def test_a_token_that_the_template_prints_and_the_file_lacks_is_refused_and_mended(tmp_path):
    kind = KINDS["smollm"]()
    size = kind.backend.get_vocab_size()
    entry = {"content": "<|im_start|>", "normalized": False, "special": True}
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    changes = {"added_tokens_decoder": {str(size): entry}, "chat_template": template}
    directory = kind.write(tmp_path / "d", **changes)
    with pytest.raises(
        UserError, match=r"prints '<\|im_start\|>' \(in tokenizer_config\.json\)"
    ) as told:
        tokenizer_from_directory(directory)
    command = str(told.value).split('python -c "')[1].removesuffix('"')
    exec(command, {})
    mended = tokenizer_from_directory(directory).tokenizer
    assert mended.encode("a<|im_start|>b")[1:-1] == [size]
    for text in HARD_TEXTS:
        assert mended.encode(text) == kind.backend.encode(text).ids


def test_a_bos_that_the_template_names_and_the_file_lacks_is_refused(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    changes = {"bos_token": "<bos>", "chat_template": template}
    with pytest.raises(UserError, match="the chat template prints '<bos>'"):
        tokenizer_from_directory(KINDS["smollm"]().write(tmp_path / "d", **changes))


def test_special_tokens_come_from_the_file_that_transformers_reads(tmp_path):
    kind = KINDS["smollm"]()
    directory = kind.write(tmp_path / "d", bos_token=None, eos_token={"content": EOS})
    older = {
        "bos_token": {"content": BOS, "lstrip": False},
        "additional_special_tokens": ["<|mark|>"],
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(older))
    found = tokenizer_from_directory(directory).tokenizer
    assert (found.bos_token, found.eos_token) == (BOS, EOS)
    assert found.bos_token_id == kind.backend.token_to_id(BOS)
    assert found.all_special_tokens == [BOS, EOS, "<|mark|>"]
    # With `added_tokens_decoder` the older file is not read.
    newer = kind.write(tmp_path / "newer", added_tokens_decoder={})
    (newer / "special_tokens_map.json").write_text(json.dumps({"bos_token": EOS}))
    assert tokenizer_from_directory(newer).tokenizer.bos_token == BOS


def test_names_of_further_tokens_reach_the_template(tmp_path):
    changes = {
        "image_token": "<|mark|>",
        "chat_template": "{{ image_token }}{{ call_token }}{{ messages[0]['content'] }}",
        "extra_special_tokens": {"call_token": "<defined>"},
    }
    directory = KINDS["smollm"]().write(tmp_path / "d", **changes)
    tokenizer = tokenizer_from_directory(directory).tokenizer
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "<|mark|><defined>how  long?"


# Chat templates


def test_a_template_is_taken_from_the_first_place_that_has_one(tmp_path):
    kind = KINDS["smollm"]()

    def rendered(directory):
        found = [
            tokenizer.apply_chat_template(TURNS, tokenize=False)
            for tokenizer in (
                tokenizer_from_directory(directory).tokenizer,
                FileTokenizer(directory),
            )
        ]
        assert found[0] == found[1]
        return found[0]

    directory = kind.write(tmp_path / "d", chat_template=None)
    assert tokenizer_from_directory(directory).tokenizer.chat_template is None
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert rendered(directory) == "processor"
    own = kind.write(tmp_path / "own", chat_template="config")
    (own / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert rendered(own) == "config"
    named = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}]
    several = kind.write(tmp_path / "several", chat_template=named)
    assert rendered(several) == "listed"
    (several / "chat_template.jinja").write_text("file")
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert rendered(several) == "file"
    names = tokenizer_from_directory(several).tokenizer.chat_template
    assert names == {"default": "file", "tool_use": "tools", "rag": "rag"}
    for tokenizer in (tokenizer_from_directory(several).tokenizer, FileTokenizer(several)):
        assert tokenizer.get_chat_template(None, [{"name": "f"}]) == "tools"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer_config.json", "[", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is '3', not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "not an object of tokens by id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "not an id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}', "not a token"),
        ("tokenizer_config.json", '{"chat_template": 5}', "not a text or a list of"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "not a text or a list"),
        ("tokenizer_config.json", '{"extra_special_tokens": "a"}', "not a list of tokens"),
        ("tokenizer_config.json", '{"truncation_side": "up"}', "cannot be read (ValueError"),
        ("special_tokens_map.json", '{"eos_token": [1]}', "eos_token is '[1]', not a token"),
        ("added_tokens.json", '{"a": "b"}', "a is 'b', not an id"),
        ("chat_template.json", '{"chat_template": 7}', "chat_template.json: chat_template is '7'"),
    ],
)
def test_a_setting_that_is_not_what_it_must_be_is_refused(tmp_path, file, content, told):
    directory = KINDS["smollm"]().write(tmp_path / "d", chat_template=None)
    (directory / file).write_text(content)
    with pytest.raises(UserError) as caught:
        tokenizer_from_directory(directory)
    assert told in str(caught.value) and str(directory) in str(caught.value)


def test_a_template_that_is_no_text_is_refused(tmp_path):
    directory = KINDS["smollm"]().write(tmp_path / "d")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        tokenizer_from_directory(directory)


def test_tokens_that_are_drawn_at_random_are_refused_and_mended(tmp_path):
    directory = KINDS["smollm"]().write(tmp_path / "d")
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"dropout": null', '"dropout": 0.1', 1))
    with pytest.raises(UserError, match='at random; set "dropout": null there'):
        tokenizer_from_directory(directory)
    path.write_text(path.read_text().replace('"dropout": 0.1', '"dropout": null', 1))
    assert tokenizer_from_directory(directory).rule == "tokenizer.json"


def test_a_later_tokenizer_call_leaves_the_file_s_rules_alone(tmp_path):
    directory = KINDS["llama2"]().write(tmp_path / "d")
    tokenizer = tokenizer_from_directory(directory).tokenizer
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer.encode("a b", truncation=True, max_length=2)
    tokenizer.encode("a b")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert isinstance(Tokenizer.from_str(before), Tokenizer)
    assert tokenizer_kinds.SPACE in tokenizer.tokenize("<s>[INST]")[1]
