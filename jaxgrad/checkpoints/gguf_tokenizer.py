"""Rebuilds the Hugging Face tokenizer of a GGUF file from its metadata.

The file names the tokenizer's kind and holds the vocabulary. How text is split, normalized and prefixed
follows from the kind (`tokenizer_rules`), as the models' published tokenizer.json says. Three things the
file does not say: whether an added token strips spaces beside it; whether it is matched before or after
normalization; whether texts behind special tokens get a space in front, too. Here none strips, all are
matched before, and all get one, as in the published files of Llama 2, TinyLlama and Mistral and as in
llama.cpp.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from jaxgrad.checkpoints.gguf_source import GgufFile
from jaxgrad.checkpoints.tokenizer_rules import (
    BYTE_LEVEL_KINDS,
    SPACE,
    Normalization,
    byte_level_bpe,
    merge_pair,
    merges_by_rank,
    sentencepiece_bpe,
)
from jaxgrad.errors import UserError, is_panic

# Token types of the GGUF format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# Entries that are read, and entries that change nothing if they have this value.
_LISTS = ("tokens", "token_type", "scores", "merges")
_READ = frozenset((*_LISTS, "model", "pre", "add_bos_token", "add_eos_token", "add_space_prefix"))
_NEUTRAL = {
    "add_sep_token": False,
    "remove_extra_whitespaces": False,
    "token_type_count": 1,
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
        tokens: by id.
        types: token types of the GGUF format, by id.
        ids: token -> id, without the fillers that the converter invents.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]

    def of_type(self, *types: int) -> list[str]:
        """The tokens of these types, in the order of their ids."""
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def tokenizer_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer that a GGUF file was made from.

    It may be byte-level BPE of a kind in `BYTE_LEVEL_KINDS`, or SentencePiece BPE with byte fallback
    (Llama 2, Mistral, Gemma).

    Raises:
        UserError: the tokenizer is of another kind; entries are not understood; the vocabulary is
            incomplete or contradicts itself.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.metadata("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in builders:
        raise UserError(
            f"{file.where}: tokenizer model {kind!r} is not supported in a GGUF file; supported: "
            "gpt2 (byte-level BPE), llama (SentencePiece BPE). Use the model's Hugging Face directory "
            "instead"
        )
    _refuse_unknown_entries(file)
    try:
        return builders[kind](file)
    except UserError:
        raise
    except BaseException as error:  # wrong list lengths, ids without a token, broken merges, ...
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        detail = " ".join(str(error).split())
        raise UserError(
            f"{file.where}: the tokenizer in its metadata is incomplete or damaged "
            f"({type(error).__name__}: {detail}); download the file again"
        ) from error


def gguf_rule(file: GgufFile) -> str:
    """The rule by which a file's tokens are made, for the user and for run.json."""
    if file.metadata("tokenizer.ggml.model") == "gpt2":
        return f"GGUF metadata: {file.metadata('tokenizer.ggml.pre')}"
    return "GGUF metadata: llama (SentencePiece BPE)"


def _refuse_unknown_entries(file: GgufFile) -> None:
    prefix = "tokenizer.ggml."
    unknown = []
    for name in file.metadata_names(prefix):
        if name in _READ or re.fullmatch(r"\w+_token_ids?", name):
            continue
        value = file.metadata(prefix + name)
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            unknown.append(f"{prefix}{name} = {str(value)[:60]!r}")
    if unknown:
        raise UserError(
            f"{file.where}: tokenizer entries not understood: {'; '.join(unknown)}. Refused, because the "
            "token ids could be wrong: give the model's Hugging Face directory instead"
        )


def _lists(file: GgufFile, *names: str) -> list[Any]:
    lists = {name: file.metadata(f"tokenizer.ggml.{name}") for name in names}
    missing = [f"tokenizer.ggml.{name}" for name, values in lists.items() if values is None]
    if missing:
        raise UserError(f"{file.where} has no {', '.join(missing)}; download the file again")
    return list(lists.values())


def _vocabulary(tokens: list[str], types: list[int]) -> Vocabulary:
    """The vocabulary, without the fillers that the converter invents for unused ids."""
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token is there twice")
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and token == f"[PAD{i}]")
    }
    return Vocabulary(tokens, types, ids)


def _byte_level(file: GgufFile) -> PreTrainedTokenizerFast:
    tokens, types, merges = _lists(file, "tokens", "token_type", "merges")
    name = file.metadata("tokenizer.ggml.pre")
    if name not in BYTE_LEVEL_KINDS:
        raise UserError(
            f"{file.where}: tokenizer splitting rule {name!r} is not supported in a GGUF file; "
            f"supported: {', '.join(BYTE_LEVEL_KINDS)}. Use the model's Hugging Face directory instead"
        )
    kind = BYTE_LEVEL_KINDS[name]
    vocabulary = _vocabulary(tokens, types)
    tokenizer = byte_level_bpe(kind, vocabulary.ids, [merge_pair(merge) for merge in merges])
    return _finish(file, tokenizer, vocabulary, adds_bos=kind.adds_bos)


def _sentencepiece(file: GgufFile) -> PreTrainedTokenizerFast:
    tokens, types, scores = _lists(file, "tokens", "token_type", "scores")
    is_gemma = file.architecture.startswith("gemma")
    if is_gemma:
        # The converter stores user-defined tokens with plain spaces. Gemma's runs of spaces are such
        # tokens, and are matched after normalization, which has replaced the spaces.
        tokens = [token.replace(" ", SPACE) if not token.strip(" ") else token for token in tokens]
    vocabulary = _vocabulary(tokens, types)
    merges = file.metadata("tokenizer.ggml.merges")
    unknown = file.metadata("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=(
            list(_merges(vocabulary, scores, is_gemma))
            if merges is None
            else [merge_pair(merge) for merge in merges]
        ),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    adds_prefix = file.metadata("tokenizer.ggml.add_space_prefix")
    how = Normalization(adds_prefix=not is_gemma if adds_prefix is None else adds_prefix)
    return _finish(file, sentencepiece_bpe(model, how), vocabulary, adds_bos=True)


def _merges(
    vocabulary: Vocabulary, scores: Sequence[float], is_gemma: bool
) -> Iterator[tuple[str, str]]:
    """The merges that SentencePiece's scores define, highest priority first.

    Every split of a token into two tokens is a merge; tokens with higher scores come first. Gemma's
    vocabulary is in the order of its merges. Its scores cannot be used: its runs of spaces and newlines
    come first, but they are user-defined tokens, whose scores the converter overwrites.
    """
    mergeable = (NORMAL, UNUSED, *((USER_DEFINED,) if is_gemma else ()))
    ids = {token: i for token, i in vocabulary.ids.items() if vocabulary.types[i] in mergeable}
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
    by_score = sorted(ids, key=lambda token: (-scores[ids[token]], ids[token]))
    yield from merges_by_rank(ids, list(ids) if is_gemma else by_score)


def _finish(
    file: GgufFile, tokenizer: Tokenizer, vocabulary: Vocabulary, *, adds_bos: bool
) -> PreTrainedTokenizerFast:
    """Add special and user-defined tokens, BOS and EOS, and the chat template."""
    special = vocabulary.of_type(CONTROL, UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    defined = vocabulary.of_type(USER_DEFINED)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in defined])

    named: dict[str, str] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.metadata(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None:
            named[f"{ours}_token"] = vocabulary.tokens[token_id]
    stated = file.metadata("tokenizer.ggml.add_bos_token")
    bos = [named["bos_token"]] if (adds_bos if stated is None else stated) else []
    eos = [named["eos_token"]] if file.metadata("tokenizer.ggml.add_eos_token") else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, vocabulary.ids[token]) for token in {*bos, *eos}],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )
    fast.chat_template = file.metadata("tokenizer.chat_template")
    return fast
