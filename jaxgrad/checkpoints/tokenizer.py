"""Tokenizers from a directory's files. For GGUF files see `gguf_tokenizer`."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxgrad.errors import UserError, is_panic

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_from_directory(directory: Path) -> PreTrainedTokenizerFast:
    """The directory's tokenizer. No code from the directory runs.

    Raises:
        UserError: there is no tokenizer, it is broken or slow, or its vocabulary is empty.
    """
    if not any((directory / name).exists() for name in VOCABULARIES):
        raise UserError(
            f"{directory} has no tokenizer: tokenizer.json is missing; copy the tokenizer's files "
            "from the model that this one was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except BaseException as error:  # a broken tokenizer may make transformers raise anything
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        detail = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {detail}); "
            "download its files (tokenizer.json, tokenizer_config.json) again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: the tokenizer is a slow one; add its tokenizer.json")
    # From an empty vocabulary transformers makes a tokenizer of special tokens only.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"{directory}: the tokenizer has no vocabulary; add its tokenizer.json")
    return tokenizer
