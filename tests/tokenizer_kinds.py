"""Small tokenizers of every kind that a tokenizer.json holds, as directories, and 200 hard texts.

Each kind has a tokenizer_config.json whose class would mislead transformers' AutoTokenizer. What a text
becomes is known from the `tokenizers` object that a directory is written from.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_tokenizers import SPLITS
from gguf_tokenizers import TEXTS as MIXED
from tiny_models import CHAT_TEMPLATE, CORPUS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS, MARK, DEFINED = "<s>", "</s>", "<|mark|>", "<defined>"
SPACE = "\u2581"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")

_PARTS = (
    "7 42 1234 1234567 3.14159 2,345", "in 2019 and  1900", "½ ² ٣ Ⅻ ①", "0x1F 1e-10 -5 +6",
    " leading", "  two", "trailing ", "trailing  ", "\ttab\t\ttabs", "a\r\nb\r\n\r\nc",
    "\n\n\nx\n", "one  two   three    four", "\u00a0no break\u2003em space\u3000wide",
    "中文字符与 English", "日本語のテキスト。かな", "한국어 문장", "العربية من اليمين",
    "हिन्दी क्षि", "Ελληνικά ΣΊΣΥΦΟΣ", "Ъ ё й \u0438\u0306", "a\u0301 e\u0301 A\u030a n\u0303",
    "ﬁne ﬀ ｆｕｌｌ", "🚂🚃", "👩‍👩‍👧 👨🏽‍🚀", "🇩🇪🇫🇷", "e\u200bz\u200dw\ufeffb",
    "<s>[INST] hi [/INST]", "a</s>b", "x<|mark|>user\ny</s>", "<|mark|>  spaces <|mark|>\n",
    "<defined>word<defined>", "<s><s>", "< s>", "<|mark", "[CLS] [SEP] [UNK]",
    "def f(x):\n    return x ** 2  # ok", "if (a&&b) {\n\t\treturn !c;\n\t}",
    "http://a.b/c?d=e&f=%20", "snake_case camelCase HTTPServer iOS", "it's IT'S we'll 'tis don’t",
    "\"quoted\" ‘single’ «guillemets»", "a-b–c—d…", "$5 €6 £7 100%",
    "supercalifragilisticexpialidocious" * 2, "a" * 70, "ab" * 40, "." * 33, " " * 33, "\n" * 9,
    "\t" * 5, "", " ", "\n", "\r\n", "\u2581under\u2581line \u2581", "Ġbyte Ċ", "<0x0A><0xFF>",
    "\x00\x07\x1b[0m", "ÄÖÜ äöü ß ẞ İ ı ǅ", "zebra zebra", "x=1;y=2", "1.\n2.\n 3.",
    "#!/bin/sh\n$PATH", "{\"k\": [1, 2]}", "\\n \\u0041",
)  # fmt: skip
HARD_TEXTS = [
    *_PARTS,
    *(f"The train {part}" for part in _PARTS),
    *(f"{part} 12 {_PARTS[(7 * i + 3) % len(_PARTS)]}" for i, part in enumerate(_PARTS)),
    *MIXED,
]
assert len(HARD_TEXTS) >= 200


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tokenizer and the settings that would mislead.

    Attributes:
        backend: the tokenizer.
        config: of tokenizer_config.json, beside the special tokens.
        model_type: of config.json.
    """

    backend: Tokenizer
    config: dict[str, Any]
    model_type: str = "llama"

    def write(self, directory: Path, **changes: Any) -> Path:
        """The directory; `changes` to tokenizer_config.json, None for out."""
        directory.mkdir(parents=True)
        self.backend.save(str(directory / "tokenizer.json"))
        names = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
        config = names | self.config | changes
        config = {name: value for name, value in config.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        return directory


@functools.cache
def byte_level_vocabulary() -> tuple[dict[str, int], list]:
    """Vocabulary and merges of a byte-level BPE; its word "zebra" comes from no merge."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = " ".join([CORPUS, *_PARTS]).replace("zebra", "").split(" ")
    trained.train_from_iterator([f" {word}" for word in words], trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"] | {"zebra": len(model["vocab"])}, [tuple(m) for m in model["merges"]]


@functools.cache
def _sentencepiece_bpe() -> tuple[dict[str, int], list]:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([CORPUS, *MIXED[:3]], trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE * 2, SPACE * 3]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = dict.fromkeys([*first, *pieces])
    vocab = {token: i for i, token in enumerate(names)}
    merges = [(SPACE, SPACE), (SPACE * 2, SPACE), *(tuple(m) for m in model["merges"])]
    return vocab, merges


def _finish(backend: Tokenizer, *, bos: bool = False, **flags: bool) -> Tokenizer:
    """Add special tokens and a defined one, and let a text start with BOS."""
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (BOS, EOS)])
    backend.add_special_tokens([AddedToken(MARK, normalized=False, **flags)])
    backend.add_tokens([AddedToken(DEFINED, normalized=False, **flags)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return backend


def _by_bytes(
    *splits: Any, use_regex: bool = False, prefix: bool = False, **model: Any
) -> Tokenizer:
    vocab, merges = byte_level_vocabulary()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior)


def _pieces(*steps: Any, before: Any = None) -> Tokenizer:
    vocab, merges = _sentencepiece_bpe()
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if steps:
        backend.normalizer = normalizers.Sequence(list(steps))
    if before is not None:
        backend.pre_tokenizer = before
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


_PREPEND, _REPLACE = normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)


def _unigram(normalizer: Any, before: Any) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, before
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", BOS, EOS], show_progress=False
    )
    backend.train_from_iterator([CORPUS, *MIXED[:4]], trainer)
    backend.decoder = decoders.Metaspace()
    return backend


def _trained(model: Any, trainer: Any, normalizer: Any, before: Any) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator([CORPUS, *MIXED[:4]], trainer)
    return backend


@functools.cache
def charsmap(rule: str = "nmt_nfkc") -> bytes:
    """SentencePiece's own table of a normalization."""
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS] * 3), model_writer=model, vocab_size=40,
        normalization_rule_name=rule, model_type="char", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    found = sentencepiece_model_pb2.ModelProto()
    found.ParseFromString(model.getvalue())
    return found.normalizer_spec.precompiled_charsmap


def _smollm() -> Kind:
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = _finish(_by_bytes(digits, use_regex=True))
    return Kind(backend, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})


def _gpt2() -> Kind:
    backend = _finish(_by_bytes(use_regex=True))
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer"}, "gpt2")


def _gpt2_over_cl100k() -> Kind:
    return Kind(_finish(_by_bytes(_split(CL100K))), {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")


def _gpt_neox() -> Kind:
    backend = _finish(_by_bytes(_split(r"\p{N}{1,3}"), use_regex=True))
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Kind(backend, {"tokenizer_class": "GPTNeoXTokenizer"}, "gpt_neox")


def _gpt_neox_without_splits() -> Kind:
    backend = _finish(_by_bytes(prefix=True))
    return Kind(
        backend, {"tokenizer_class": "GPTNeoXTokenizerFast", "add_prefix_space": False}, "gpt_neox"
    )


def _llama3() -> Kind:
    backend = _finish(_by_bytes(_split(SPLITS["llama-bpe"]), ignore_merges=True), bos=True)
    bos_first = backend.post_processor
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_first]
    )
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})


def _qwen2_class_over_another_rule() -> Kind:
    backend = _finish(
        _by_bytes(_split(r"\p{N}{1,3}"), _split(DEEPSEEK[3]), _split(CL100K)), bos=True
    )
    return Kind(backend, {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2")


def _llama2() -> Kind:
    backend = _finish(_pieces(_PREPEND, _REPLACE), bos=True)
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer", "legacy": False})


def _mistral() -> Kind:
    before = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    return Kind(
        _finish(_pieces(before=before), bos=True),
        {"tokenizer_class": "LlamaTokenizerFast"},
        "mistral",
    )


def _gemma() -> Kind:
    backend = _finish(_pieces(_REPLACE), bos=True)
    backend.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 5)])
    backend.pre_tokenizer = _split(" ", "merged_with_previous")
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer"}, "gemma2")


def _code_llama() -> Kind:
    backend = _finish(_pieces(_PREPEND, _REPLACE), bos=True)
    names = [f"{SPACE}<{name}>" for name in ("PRE", "SUF", "MID", "EOT")]
    backend.add_special_tokens([AddedToken(name, normalized=True) for name in names])
    return Kind(backend, {"tokenizer_class": "CodeLlamaTokenizer"})


def _yi() -> Kind:
    return Kind(
        _finish(_pieces(_REPLACE)), {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True}
    )


def _phi3() -> Kind:
    backend = _finish(_pieces(_PREPEND, _REPLACE), rstrip=True)
    backend.add_tokens([AddedToken("word", single_word=True, lstrip=True)])
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, "phi3")


def _deepseek() -> Kind:
    splits = [_split(pattern) for pattern in DEEPSEEK]
    backend = _finish(_by_bytes(*splits, pre_tokenizers.Digits(individual_digits=True)))
    backend.normalizer = normalizers.Sequence([])
    return Kind(backend, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True})


def _tekken() -> Kind:
    backend = _finish(_by_bytes(_split(SPLITS["tekken"]), ignore_merges=True), bos=True)
    return Kind(backend, {"tokenizer_class": "LlamaTokenizer"}, "mistral")


def _bytes_as_normalizer() -> Kind:
    vocab, merges = byte_level_vocabulary()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.ByteLevel()])
    backend.decoder = decoders.ByteLevel()
    return Kind(_finish(backend), {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")


def _metaspace(scheme: str) -> Kind:
    before = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=True)
    return Kind(_finish(_pieces(before=before)), {"tokenizer_class": "LlamaTokenizer"})


def _t5() -> Kind:
    before = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    backend = _finish(_unigram(normalizers.Precompiled(charsmap()), before))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, backend.token_to_id(EOS))]
    )
    return Kind(backend, {"tokenizer_class": "XLNetTokenizer"})


def _xlnet() -> Kind:
    steps = [
        normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(),
        normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(),
    ]  # fmt: skip
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return Kind(
        _finish(_unigram(normalizers.Sequence(steps), split)), {"tokenizer_class": "T5Tokenizer"}
    )


def _bert() -> Kind:
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    ends = [(name, backend.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    backend.post_processor = processors.BertProcessing(*ends)
    backend.decoder = decoders.WordPiece()
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False}
    return Kind(_finish(backend), config | {"bos_token": None, "eos_token": None}, "bert")


def _words() -> Kind:
    backend = _trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
        None,
        pre_tokenizers.Whitespace(),
    )
    backend.decoder = decoders.CTC(pad_token="<unk>")
    return Kind(_finish(backend), {"tokenizer_class": "LlamaTokenizer"})


def _lower_case_words() -> Kind:
    steps = [
        normalizers.NFD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Nmt(),
    ]
    splits = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.UnicodeScripts(),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend = _trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainer,
        normalizers.Sequence(steps),
        pre_tokenizers.Sequence(splits),
    )
    backend.decoder = decoders.BPEDecoder()
    return Kind(_finish(backend), {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")


def _roberta() -> Kind:
    backend = _finish(_by_bytes(use_regex=True, prefix=True))
    ends = [(name, backend.token_to_id(name)) for name in (EOS, BOS)]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True)
    return Kind(backend, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, "gpt2")


def _odd_splits() -> Kind:
    splits = [pre_tokenizers.CharDelimiterSplit("="), pre_tokenizers.FixedLength(7)]
    return Kind(_finish(_by_bytes(*splits)), {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2")


KINDS: dict[str, Callable[[], Kind]] = {
    "smollm": _smollm,
    "gpt2": _gpt2,
    "gpt2_over_cl100k": _gpt2_over_cl100k,
    "gpt_neox": _gpt_neox,
    "gpt_neox_without_splits": _gpt_neox_without_splits,
    "llama3": _llama3,
    "qwen2_class_over_another_rule": _qwen2_class_over_another_rule,
    "llama2": _llama2,
    "mistral": _mistral,
    "gemma": _gemma,
    "code_llama": _code_llama,
    "yi": _yi,
    "phi3": _phi3,
    "deepseek": _deepseek,
    "tekken": _tekken,
    "bytes_as_normalizer": _bytes_as_normalizer,
    "metaspace_always": functools.partial(_metaspace, "always"),
    "metaspace_first": functools.partial(_metaspace, "first"),
    "metaspace_never": functools.partial(_metaspace, "never"),
    "t5": _t5,
    "xlnet": _xlnet,
    "bert": _bert,
    "words": _words,
    "lower_case_words": _lower_case_words,
    "roberta": _roberta,
    "odd_splits": _odd_splits,
}
