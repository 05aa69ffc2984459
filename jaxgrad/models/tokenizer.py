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
    kind = file.metadata("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.where}: tokenizer model {kind!r} is not supported in a GGUF file; supported: gpt2 "
            "(byte-level BPE). Use the model's Hugging Face directory instead"
        )
    tokens: list[str] = file.metadata("tokenizer.ggml.tokens")
    types: list[int] = file.metadata("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in file.metadata("tokenizer.ggml.merges")]
    # Llama 3 prefers a whole word of the vocabulary to the product of its merges.
    pre = file.metadata("tokenizer.ggml.pre")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
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
    # llama.cpp's default for byte-level BPE: no BOS, unless the architecture's rule or the file says so.
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything on a broken tokenizer
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{directory}: no usable tokenizer ({first_line})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: the tokenizer is a slow one; add its tokenizer.json")
    return tokenizer
