"""Tokenizers from a directory's own files; those of GGUF files are in `gguf_tokenizer`."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxgrad.errors import UserError, is_panic

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_from_directory(directory: Path) -> PreTrainedTokenizerFast:
    """The directory's tokenizer; `trust_remote_code` is never given, so no code from it runs."""
    if not any((directory / name).exists() for name in VOCABULARIES):
        raise UserError(
            f"{directory} has no tokenizer: tokenizer.json is missing; copy the tokenizer's files "
            "from the model that this one was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except BaseException as error:  # transformers raises nearly anything on a broken tokenizer
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {told}); "
            "download its files (tokenizer.json, tokenizer_config.json) again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: the tokenizer is a slow one; add its tokenizer.json")
    # transformers makes a tokenizer of nothing but special tokens where the vocabulary is empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{directory}: the tokenizer has no vocabulary; add its tokenizer.json")
    return tokenizer
