"""SentencePiece models trained here: tokenizer.model files, as of Llama, Gemma and others."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tiny_models import CORPUS

LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 330,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "hard_vocab_limit": False,
    "character_coverage": 0.98,
}
GEMMA = LLAMA | {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>"],
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
}
KINDS = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "user_defined": LLAMA | {"user_defined_symbols": ["<tool>", "ab", "▁the▁"]},
    "collapsing": LLAMA | {"remove_extra_whitespaces": True},
    "no_prefix": LLAMA | {"add_dummy_prefix": False},
}


def train(**options: Any) -> bytes:
    """The content of a tokenizer.model."""
    model = io.BytesIO()
    lines = [line for line in CORPUS.replace("  ", " \n").split("\n") if line]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def write(directory: Path, model: bytes, **config: Any) -> Path:
    """A directory with only tokenizer.model, and tokenizer_config.json."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory
