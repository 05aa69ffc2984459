"""Small tokenizers of every kind that GGUF files hold: as a Hugging Face directory and as a GGUF file.

The directory is what is on the hub: a tokenizer.json with the kind's own pipeline, read by the `tokenizers`
library, and a tokenizer_config.json. The merges of the SentencePiece kinds are made from the scores by
transformers' `generate_merges`, as those on the hub were.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
from tiny_models import CHAT_TEMPLATE, CORPUS, LLAMA3_SPLIT
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
from transformers.tokenization_utils_base import generate_merges

SPACE = "\u2581"
TEXTS = [
    "The train leaves at noon; isn't that LATE? We'll see, THEY'RE slow.",
    "def wait(a, b):\n\treturn b - a  # in hours\r\n\n\nif __name__ == '__main__': wait(1, 2)",
    "x = [\n\t\t1,\n\t\t\t2\n]\n\n\n\n\n\n\n\n\nend/path/to//file.py\n",
    "7 42 1234 1234567 3.14159 2,345 ½ ² ٣",
    "one  two   three    four\t\tfive \n  \n six ",
    " leading", "  two leading", "\n leading line", "\t",
    "Äpfel, naïve cafés, Ελληνικά, 中文字符, العربية, a\u0301 A\u030a",
    "🚂 and 👩‍👩‍👧 and 🇩🇪",
    "<s>a<|mark|>user\nb</s> <defined>  <s >", "<bos>a<start_of_turn>user\nb<end_of_turn>\n<table>",
    "a</s> b</s>c</s>  d", "<unk><pad>", "<0x0A> [PAD300] [PAD7]", f"a{SPACE}b {SPACE}{SPACE} c",
    ";\n/" * 20, "zebra zebra",
    "camelCase HTTPServer iPhone ÉCOLE", "it's IT'S 'll", "a" * 50,
    "", " ", "  ", "\n\n",
    *(" " * n + "x" + "\n" * n for n in (3, 4, 5, 6, 7, 8, 9, 13, 17)),
]  # fmt: skip
TEXTS.append(" ".join(TEXTS))

# The splitting rules as the original tokenizers state them (tokenizer.json of Qwen 2, Mistral Nemo).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "tekken": TEKKEN_SPLIT}
BOS_KINDS = ("llama-bpe", "tekken")
BYTE_LEVEL = ("smollm", "gpt-2", *SPLITS)


@dataclasses.dataclass(frozen=True)
class Entries:
    """What the GGUF file of a tokenizer holds: tokens and types by id, and entries by name."""

    tokens: list[str]
    types: list[int]
    named: dict[str, Any]

    def write(self, path: Path, architecture: str = "llama", **changes: Any) -> Path:
        """The file, with one tensor; `changes` to the entries under tokenizer.ggml, None for out."""
        writer = gguf.GGUFWriter(path, architecture)
        lists = {"tokens": self.tokens, "token_type": self.types}
        for name, value in (lists | self.named | changes).items():
            full = (
                "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
            )
            if name.endswith("_token_id") and value is not None:
                writer.add_uint32(full, value)
            elif value is not None:
                writer.add_key_value(full, value, gguf.GGUFValueType.get_type(value))
        writer.add_tensor("token_embd.weight", np.zeros((2, 3), np.float32))
        return gguf_files.finish(writer)


def save(backend: Tokenizer, directory: Path, **config: Any) -> Tokenizer:
    """The tokenizer as a directory on the hub has it, read by the `tokenizers` library."""
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def byte_level(pre: str, directory: Path) -> tuple[Tokenizer, Entries]:
    """A byte-level BPE, trained on the corpus, with the kind's splitting rule."""
    backend = Tokenizer(models.BPE(ignore_merges=pre in BOS_KINDS))
    splits: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre == "smollm":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre in SPLITS:
        splits = [
            pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = [text for text in TEXTS if "zebra" not in text]
    backend.train_from_iterator([CORPUS, " ".join(seen)], trainer)
    # A word that no merges make: it is only found where merges are ignored.
    state = json.loads(backend.to_str())
    state["model"]["vocab"]["zebra"] = len(state["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(state))
    special = ["<s>", "</s>", "<|mark|>"]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.add_tokens([AddedToken("<defined>", normalized=False)])
    bos = backend.token_to_id("<s>")
    if pre in BOS_KINDS:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    original = save(
        backend,
        directory,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|mark|>",
        unk_token="</s>",
    )
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 4) + [gguf.TokenType.CONTROL] * 3
    types.append(gguf.TokenType.USER_DEFINED)
    # The embedding has more rows than the tokenizer has tokens, as Qwen's.
    for _ in range(7):
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(gguf.TokenType.UNUSED)
    merges = json.loads(backend.to_str())["model"]["merges"]
    named = {
        "model": "gpt2",
        "pre": pre,
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": bos,
        "eos_token_id": vocab["</s>"],
        "padding_token_id": vocab["<|mark|>"],
        "unknown_token_id": vocab["</s>"],
        "chat_template": CHAT_TEMPLATE,
    }
    return original, Entries(tokens, [int(kind) for kind in types], named)


def _pieces() -> list[str]:
    """Pieces with several letters in the order of their merges, then single letters, rare ones not."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=230, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([CORPUS, *TEXTS[:3]], trainer)
    vocab = trained.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    letters = [piece for piece in pieces if len(piece) == 1 and piece != "\n"]
    return [piece for piece in pieces if len(piece) > 1 and "\n" not in piece] + letters


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(kind: str, directory: Path) -> tuple[Tokenizer, Entries]:
    """BPE by SentencePiece with bytes to fall back on: of Llama 2, of Mistral or of Gemma.

    In Gemma's vocabulary the tokens that users add stand in front, and merges make them, too; in
    Llama's they come at the end, and no merge does.
    """
    gemma = kind == "gemma"
    pieces = _pieces()
    if gemma:
        control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
        runs = ["\n" * n for n in range(1, 7)] + [SPACE * n for n in range(2, 7)]
        defined = [*runs, "<table>", "</table>"]
        tokens = [*control, *defined, *BYTES, *pieces]
        plain = len(tokens)
    else:
        control = ["<unk>", "<s>", "</s>"] + ["<|mark|>"] * (kind == "mistral")
        defined = ["<defined>", "<|mark|>"] * (kind == "llama")
        pieces[3:3] = [SPACE * 2, SPACE * 4]
        pieces[9:9] = [SPACE * 3]
        tokens = [*control, *BYTES, *pieces]
        plain = len(tokens)
        tokens += defined
    ids = {token: i for i, token in enumerate(tokens[:plain]) if not token.startswith("[PAD")}
    scores = [0.0] * len(tokens)
    for i, token in enumerate([*BYTES, *pieces]):
        scores[tokens.index(token)] = 0.0 if token in BYTES else 256.0 - i
    for token in [*control, *defined]:  # the converter's: tokens of added_tokens_decoder
        scores[tokens.index(token)] = -1000.0
    true_scores = {token: scores[i] for token, i in ids.items()}
    merges = generate_merges(ids, None if gemma else true_scores)

    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        replace if gemma else normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if gemma else [*steps, decoders.Strip(" ", 1, 0)])
    special = [t for t in control if t != "<mask>"] + ([] if gemma else ["<|mark|>"])
    added = sorted({*control, *defined}, key=tokens.index)
    for token in added:
        backend.add_tokens([AddedToken(token, normalized=False, special=token in special)])
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
    )
    original = save(
        backend,
        directory,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>" if gemma else None,
    )
    types = [_spm_type(token, special) for token in tokens]
    for token in defined:
        if token not in special:
            types[tokens.index(token)] = gguf.TokenType.USER_DEFINED
    named = {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "bos_token_id": tokens.index(bos),
        "eos_token_id": tokens.index(eos),
        "unknown_token_id": tokens.index("<unk>"),
        "padding_token_id": tokens.index("<pad>") if gemma else None,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False if gemma else None,
        "chat_template": CHAT_TEMPLATE,
    }
    # The converter writes the spaces of tokens that users add as spaces.
    written = [t.replace(SPACE, " ") if t in defined else t for t in tokens]
    return original, Entries(written, [int(t) for t in types], named)


def _spm_type(token: str, special: list[str]) -> gguf.TokenType:
    if token == "<unk>":
        return gguf.TokenType.UNKNOWN
    if token in special or token == "<mask>":
        return gguf.TokenType.CONTROL
    if token in BYTES:
        return gguf.TokenType.BYTE
    return gguf.TokenType.UNUSED if token.startswith("[PAD") else gguf.TokenType.NORMAL
