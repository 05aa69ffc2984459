"""Tokenizers: a directory's own files, or rebuilt from a GGUF file's metadata."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxgrad.errors import UserError
from jaxgrad.models.gguf_source import GgufFile

# Splitting rules by the name that llama.cpp gives them. Each must be the original tokenizer's own:
# a near one gives other tokens on runs of spaces and digits.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _pre_tokenizer(name: Any, where: str) -> Any:
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if name == "llama-bpe":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise UserError(
        f"{where}: tokenizer splitting rule {name!r} is not supported in a GGUF file; "
        "supported: smollm, llama-bpe. Use the model's Hugging Face directory instead"
    )


def tokenizer_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer that a byte-level BPE GGUF file was made from."""
    try:
        return _build_from_gguf(file)
    except UserError:
        raise
    except Exception as error:  # lists of another length, ids without a token, broken merges, ...
        raise UserError(
            f"{file.where}: the tokenizer in its metadata is incomplete or damaged "
            f"({type(error).__name__}: {error}); download the file again"
        ) from error


def _build_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    kind = file.metadata("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.where}: tokenizer model {kind!r} is not supported in a GGUF file; supported: "
            "gpt2 (byte-level BPE). Use the model's Hugging Face directory instead"
        )
    lists = {n: file.metadata(f"tokenizer.ggml.{n}") for n in ("tokens", "token_type", "merges")}
    missing = [f"tokenizer.ggml.{name}" for name, values in lists.items() if values is None]
    if missing:
        raise UserError(f"{file.where} has no {', '.join(missing)}; download the file again")
    tokens: list[str] = lists["tokens"]
    types: list[int] = lists["token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("a token stands there twice")
    merges = [tuple(merge.split(" ")) for merge in lists["merges"]]
    # Llama 3 prefers a whole word of the vocabulary to the product of its merges.
    pre = file.metadata("tokenizer.ggml.pre")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, file.where)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in defined])

    named: dict[str, str] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.metadata(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None:
            named[f"{ours}_token"] = tokens[token_id]
    # llama.cpp's default for byte-level BPE: no BOS, unless the splitting rule or the file says so.
    adds_bos = file.metadata("tokenizer.ggml.add_bos_token")
    if adds_bos if adds_bos is not None else pre == "llama-bpe":
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokens.index(bos))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )
    fast.chat_template = file.metadata("tokenizer.chat_template")
    return fast


def tokenizer_from_directory(directory: Path) -> PreTrainedTokenizerFast:
    """The directory's tokenizer; `trust_remote_code` is never given, so no code from it runs."""
    if not any((directory / name).exists() for name in VOCABULARIES):
        raise UserError(
            f"{directory} has no tokenizer: tokenizer.json is missing; copy the tokenizer's files "
            "from the model that this one was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything on a broken tokenizer
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
