"""Tokenizers rebuilt from GGUF files, against tokenizer.json in its published form.

The oracle is the `tokenizers` library on that file. No class of transformers has a say.
"""

import json

import gguf_tokenizers
import pytest
from checkpoint_files import refusal, write_gguf
from gguf_tokenizers import BYTE_LEVEL, SPACE, TEXTS
from tokenizer_kinds import HARD_TEXTS

from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxgrad.checkpoints.saved import SavedDecoder
from jaxgrad.errors import UserError
from jaxgrad.reference.tokenizer import FileTokenizer

ARCHITECTURES = {"gemma": "gemma2", "qwen2": "qwen2"}
KINDS = (*BYTE_LEVEL, "llama", "mistral", "gemma")


def build(kind, directory):
    make = gguf_tokenizers.byte_level if kind in BYTE_LEVEL else gguf_tokenizers.sentencepiece
    return make(kind, directory)


def rebuild(entries, path, architecture="llama", **changes):
    return tokenizer_from_gguf(GgufFile(entries.write(path, architecture, **changes)))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """The rebuilt tokenizer, the original, and its directory."""
    folder, kind = tmp_path_factory.mktemp("tokenizer"), request.param
    original, entries = build(kind, folder / "original")
    architecture = ARCHITECTURES.get(kind, "llama")
    return rebuild(entries, folder / "t.gguf", architecture), original, folder / "original"


def test_token_ids_are_the_original_s(pair):
    ours, original, _ = pair
    for text in (*TEXTS, *HARD_TEXTS):
        assert ours.encode(text) == original.encode(text).ids, text
        without = ours.encode(text, add_special_tokens=False)
        assert without == original.encode(text, add_special_tokens=False).ids, text


def test_offsets_are_the_original_s(pair):
    ours, original, _ = pair
    for text in TEXTS:
        offsets = ours(text, return_offsets_mapping=True)["offset_mapping"]
        assert offsets == original.encode(text).offsets, text


def test_decoding_is_the_original_s(pair):
    ours, original, _ = pair
    for text in TEXTS:
        token_ids = original.encode(text).ids
        assert ours.decode(token_ids) == original.decode(token_ids, skip_special_tokens=False), text


def test_the_vocabulary_and_the_named_tokens_are_the_original_s(pair):
    ours, original, directory = pair
    assert ours.get_vocab() == original.get_vocab()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == config[name], name


def test_chats_are_the_original_s(pair):
    ours, original, directory = pair
    chat = [
        {"role": "user", "content": "how  long?"},
        {"role": "assistant", "content": " 2 hours\n"},
    ]
    readers = (ours, FileTokenizer(directory))
    texts = [reader.apply_chat_template(chat, tokenize=False) for reader in readers]
    assert texts[0] == texts[1]
    assert ours.encode(texts[0]) == original.encode(texts[1]).ids


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_piece_behind_a_special_token_starts_with_a_space(tmp_path, kind):
    original, entries = build(kind, tmp_path / "original")
    ours = rebuild(entries, tmp_path / "t.gguf")
    assert ours.tokenize("<s>[INST]")[1].startswith(SPACE)
    assert (
        ours.tokenize("<s>[INST]") == original.encode("<s>[INST]", add_special_tokens=False).tokens
    )


def test_a_conversion_with_the_older_rule_is_refused(tmp_path):
    """Older versions converted Llama's GGUF files with a tokenizer that left out those spaces."""
    _, entries = build("llama", tmp_path / "original")
    directory = tmp_path / "converted"
    rebuild(entries, tmp_path / "t.gguf").save_pretrained(directory / "tokenizer")
    (directory / "weights").mkdir()
    described = {"config": {}, "parameters": {}, "weight_files": {}, "format": 1}
    described["source"] = {"files": {"t.gguf": [1, 2]}}
    (directory / "jaxgrad_checkpoint.json").write_text(json.dumps(described))
    assert SavedDecoder(directory).read_tokenizer().rule == "tokenizer.json"
    path = directory / "tokenizer" / "tokenizer.json"
    file = json.loads(path.read_text())
    file["normalizer"] = None
    file["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "first",
        "split": False,
    }
    path.write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"by an older jaxgrad.*convert the model again"):
        SavedDecoder(directory).read_tokenizer()
    described["tokenizer_rule"] = "GGUF metadata"
    (directory / "jaxgrad_checkpoint.json").write_text(json.dumps(described))
    assert SavedDecoder(directory).read_tokenizer().tokenizer.tokenize("<s>[")[1] == "["


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_as_the_file_says(tmp_path, kind, bos, eos):
    original, entries = build(kind, tmp_path / "original")
    ours = rebuild(entries, tmp_path / "t.gguf", add_bos_token=bos, add_eos_token=eos)
    text = original.encode("the train", add_special_tokens=False).ids
    ends = [original.token_to_id(token) for token in ("<s>", "</s>")]
    expected = ends[:1] * bos + text + ends[1:] * eos
    assert ours.encode("the train") == expected


@pytest.mark.parametrize(("kind", "bos"), [("qwen2", False), ("llama-bpe", True), ("llama", True)])
def test_bos_where_the_file_does_not_say(tmp_path, kind, bos):
    original, entries = build(kind, tmp_path / "original")
    ours = rebuild(entries, tmp_path / "t.gguf", add_bos_token=None)
    assert (ours.encode("the train")[0] == original.token_to_id("<s>")) == bos


def test_no_space_in_front_where_the_file_says_so(tmp_path):
    _, entries = build("llama", tmp_path / "original")
    ours = rebuild(entries, tmp_path / "t.gguf", add_space_prefix=False)
    assert ours.tokenize("the")[0][0] == "t"
    assert ours.decode(ours.encode(" the", add_special_tokens=False)) == " the"
    assert rebuild(entries, tmp_path / "u.gguf").tokenize("the")[0][0] == SPACE


def test_merges_of_the_file_go_before_those_of_the_scores(tmp_path):
    _, entries = build("llama", tmp_path / "original")
    first = next(t for t in entries.tokens if len(t) == 2 and SPACE not in t and t.isalpha())
    ours = rebuild(entries, tmp_path / "t.gguf", merges=[" ".join(first)])
    assert ours.tokenize(f"the{first}") == [SPACE, *"the", first]


def test_an_exact_score_order_decides_and_not_the_ids(tmp_path):
    """Of two conflicting merges the one with the better score wins, wherever it is."""
    tokens = ["<unk>", "<s>", "</s>", *gguf_tokenizers.BYTES, "ab", "bc", "a", "b", "c"]
    types = [2, 3, 3, *[6] * 256, *[1] * 5]
    for scores, expected in (((-2.0, -1.0), ["a", "bc"]), ((-1.0, -2.0), ["ab", "c"])):
        named = {"model": "llama", "scores": [0.0] * 259 + [*scores, -3.0, -4.0, -5.0]}
        named |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        entries = gguf_tokenizers.Entries(tokens, types, named)
        ours = rebuild(entries, tmp_path / f"{expected[0]}.gguf", add_space_prefix=False)
        assert ours.tokenize("abc") == expected


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
        (
            {"tokenizer.ggml.merges": None, "tokenizer.ggml.token_type": None},
            "has no tokenizer.ggml.token_type, tokenizer.ggml.merges",
        ),
        ({"tokenizer.ggml.model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokenizer.ggml.model": None}, "tokenizer model None is not supported"),
        ({"tokenizer.ggml.pre": "default"}, "rule 'default' is not supported"),
        ({"tokenizer.ggml.pre": None}, "rule None is not supported"),
        ({"tokenizer.ggml.merges": ["t h e"]}, "incomplete or damaged"),
        ({"tokenizer.ggml.merges": ["xyz q"]}, "incomplete or damaged"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "incomplete or damaged"),
        ({"tokenizer.ggml.tokens": ["a"] * 7}, "a token is there twice"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "incomplete or damaged"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "damaged"),
        (
            {"tokenizer.ggml.add_sep_token": True, "tokenizer.ggml.lowercase": True},
            "add_sep_token = 'True'; tokenizer.ggml.lowercase = 'True'",
        ),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "entries not understood"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, metadata, told):
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    message = refusal(path)
    assert message.startswith(str(path)) and told in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": [0.0]}, "1 scores for"),
        ({"unknown_token_id": 10**6}, "incomplete or damaged"),
        ({"merges": ["t"]}, "incomplete or damaged"),
        ({"merges": ["\n t"]}, "incomplete or damaged"),
    ],
)
def test_a_sentencepiece_that_cannot_be_rebuilt_is_refused(tmp_path, changes, told):
    _, entries = build("llama", tmp_path / "original")
    with pytest.raises(UserError, match=told) as caught:
        rebuild(entries, tmp_path / "t.gguf", **changes)
    assert "\n" not in str(caught.value)
