"""Directories without tokenizer.json: ids against the sentencepiece library and other pipelines."""

import base64
import json

import pytest
import sentencepiece as spm
import sentencepiece_models
from gguf_tokenizers import QWEN2_SPLIT
from sentencepiece import sentencepiece_model_pb2
from sentencepiece_models import KINDS, LLAMA
from tokenizer_kinds import HARD_TEXTS, byte_level_vocabulary
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from jaxgrad.checkpoints.sentencepiece_file import read_sentencepiece
from jaxgrad.checkpoints.tokenizer import tokenizer_from_directory
from jaxgrad.errors import UserError

# Texts in which no special token of the models stands: those sentencepiece reads as any other text.
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
PLAIN = [text for text in HARD_TEXTS if not any(name in text for name in (*SPECIAL, "\x00"))]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """A model's content, its directory, and the sentencepiece library's reading of it."""
    content = sentencepiece_models.train(**KINDS[request.param])
    name = "GemmaTokenizer" if request.param == "gemma" else "LlamaTokenizer"
    directory = sentencepiece_models.write(
        tmp_path_factory.mktemp("spm") / "d", content, tokenizer_class=name
    )
    return directory, spm.SentencePieceProcessor(model_proto=content)


def test_the_ids_are_sentencepiece_s(model):
    directory, library = model
    loaded = tokenizer_from_directory(directory)
    assert loaded.rule.startswith("tokenizer.model, converted by the rule of ")
    assert len(PLAIN) > 180
    for text in PLAIN:
        assert loaded.tokenizer.encode(text, add_special_tokens=False) == library.encode(text), text
        assert loaded.tokenizer.encode(text) == [library.bos_id(), *library.encode(text)], text


def test_the_file_is_read_as_by_the_library(model):
    directory, library = model
    read = read_sentencepiece(directory / "tokenizer.model")
    size = library.get_piece_size()
    assert [piece for piece, _, _ in read.pieces] == [library.id_to_piece(i) for i in range(size)]
    assert [score for _, score, _ in read.pieces] == [library.get_score(i) for i in range(size)]
    ends = (library.bos_id(), library.eos_id(), library.unk_id())
    assert (read.bos_id, read.eos_id, read.unknown_id) == ends


def test_special_tokens_are_the_model_s_where_nothing_names_them(model):
    directory, library = model
    tokenizer = tokenizer_from_directory(directory).tokenizer
    assert tokenizer.bos_token_id == library.bos_id()
    assert tokenizer.eos_token_id == library.eos_id()


@pytest.fixture(scope="module")
def llama() -> bytes:
    return sentencepiece_models.train(**LLAMA)


def test_a_space_stands_behind_special_tokens_unless_legacy_is_false(tmp_path, llama):
    library = spm.SentencePieceProcessor(model_proto=llama)
    old = sentencepiece_models.write(tmp_path / "a", llama, tokenizer_class="LlamaTokenizer")
    ids = tokenizer_from_directory(old).tokenizer.encode("<s>[INST] the train</s>now")
    parts = [1, 1, *library.encode("[INST] the train"), 2, *library.encode("now")]
    assert ids == parts
    new = sentencepiece_models.write(
        tmp_path / "b", llama, tokenizer_class="LlamaTokenizer", legacy=False
    )
    loaded = tokenizer_from_directory(new)
    assert loaded.rule.endswith("LlamaTokenizer with legacy=False")
    behind = loaded.tokenizer.tokenize("<s>train")[1]
    assert behind[0] == "t" and loaded.tokenizer.tokenize("train")[0][0] == "▁"
    for text in PLAIN:
        if text and text[0] not in " ▁":  # the class adds no second space
            assert loaded.tokenizer.encode(text)[1:] == library.encode(text), text


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_ends_are_added_as_the_config_says(tmp_path, llama, bos, eos):
    config = {"add_bos_token": bos, "add_eos_token": eos, "tokenizer_class": "LlamaTokenizerFast"}
    stated = {name: value for name, value in config.items() if value is not None}
    directory = sentencepiece_models.write(tmp_path / "d", llama, **stated)
    text = spm.SentencePieceProcessor(model_proto=llama).encode("the train")
    expected = [1] * (bos is not False) + text + [2] * (eos is True)
    assert tokenizer_from_directory(directory).tokenizer.encode("the train") == expected


def test_added_tokens_get_the_ids_that_the_files_give(tmp_path, llama):
    directory = sentencepiece_models.write(tmp_path / "d", llama)
    size = read_sentencepiece(directory / "tokenizer.model").pieces.__len__()
    added = {"<|im_end|>": size + 1, "<|im_start|>": size}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    loaded = tokenizer_from_directory(directory)
    assert loaded.tokenizer.encode("<|im_start|><|im_end|>") == [1, size, size + 1]
    assert loaded.tokenizer.eos_token_id == size + 1
    assert loaded.rule == "tokenizer.model, converted by the rule of LlamaTokenizer"
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 5}))
    with pytest.raises(UserError, match=f"gets the id {size} behind a vocabulary of {size}"):
        tokenizer_from_directory(directory)


# vocab.json and merges.txt


def merges_directory(directory, **config):
    vocab, merges = byte_level_vocabulary()
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("GPT2Tokenizer", False), ("GPT2Tokenizer", True), ("Qwen2Tokenizer", False)],
)
def test_merges_are_converted_by_the_rule_of_their_class(tmp_path, name, prefix):
    directory = merges_directory(tmp_path / "d", tokenizer_class=name, add_prefix_space=prefix)
    vocab, merges = byte_level_vocabulary()
    other = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if name == "Qwen2Tokenizer":
        other.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    else:
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    loaded = tokenizer_from_directory(directory)
    assert loaded.rule == f"vocab.json and merges.txt, converted by the rule of {name}"
    for text in HARD_TEXTS:
        assert loaded.tokenizer.encode(text) == other.encode(text).ids, text
    end = loaded.tokenizer.encode("a<|endoftext|>")[-1]
    assert end == loaded.tokenizer.eos_token_id == len(vocab)


# Refusals


def test_what_only_a_slow_tokenizer_reads_is_refused(tmp_path, llama):
    other = sentencepiece_models.write(tmp_path / "a", llama, tokenizer_class="T5Tokenizer")
    told = "names the class T5Tokenizer; known for such files: LlamaTokenizer"
    with pytest.raises(UserError, match=told):
        tokenizer_from_directory(other)
    lines = "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    ranks = sentencepiece_models.write(tmp_path / "b", lines.encode())
    with pytest.raises(UserError, match=r"no SentencePiece model \(tiktoken's do not say"):
        tokenizer_from_directory(ranks)
    for name in ("qwen.tiktoken", "tekken.json", "spiece.model", "vocab.txt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("x")
        with pytest.raises(UserError, match=f"the tokenizer is a slow one .{name}.; add the"):
            tokenizer_from_directory(folder)
    roberta = merges_directory(tmp_path / "c", tokenizer_class="RobertaTokenizer")
    with pytest.raises(UserError, match="names the class RobertaTokenizer; known for such"):
        tokenizer_from_directory(roberta)
    nameless = merges_directory(tmp_path / "e")
    with pytest.raises(UserError, match="names no class"):
        tokenizer_from_directory(nameless)
    (nameless / "config.json").write_text('{"model_type": "gpt2"}')
    assert "GPT2Tokenizer" in tokenizer_from_directory(nameless).rule
    (nameless / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match=r"merges.txt cannot be read"):
        tokenizer_from_directory(nameless)
    (nameless / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"but no merges.txt"):
        tokenizer_from_directory(nameless)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "unigram"}, "another kind than BPE"),
        ({"byte_fallback": False}, "no bytes to fall back on"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a table that normalizes characters"),
        ({"treat_whitespace_as_suffix": True}, "spaces behind words"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path, changes, told):
    content = sentencepiece_models.train(**LLAMA | changes | {"vocab_size": 320})
    with pytest.raises(UserError, match=told):
        tokenizer_from_directory(sentencepiece_models.write(tmp_path / "d", content))


def test_a_model_that_keeps_spaces_is_refused(tmp_path, llama):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(llama)
    model.normalizer_spec.escape_whitespaces = False
    directory = sentencepiece_models.write(tmp_path / "d", model.SerializeToString())
    with pytest.raises(UserError, match="spaces that are kept as they are"):
        tokenizer_from_directory(directory)


def test_a_damaged_model_is_refused(tmp_path, llama):
    for i, content in enumerate((b"", b"\x00", llama[:500], llama[:-1], b"\x0a" * 50)):
        directory = sentencepiece_models.write(tmp_path / str(i), content)
        with pytest.raises(UserError):
            tokenizer_from_directory(directory)
