"""The rules of tokenizers that bring no tokenizer.json: byte-level BPE by name, and SentencePiece BPE.

GGUF files and directories with older vocabulary files (`tokenizer_convert`) hold a vocabulary, and name
the rest. What is built here is what the models' published tokenizer.json says.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"  # SentencePiece's character for a space

# Splitting rules by llama.cpp's names. Each must be exactly the original tokenizer's: one that is nearly
# right gives other tokens for runs of spaces and digits.
_SIGNS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclasses.dataclass(frozen=True)
class ByteLevelKind:
    """What byte-level BPE tokenizers with one splitting rule have in common.

    Attributes:
        split: regular expression of the words; None for GPT-2's.
        splits_digits: whether each digit is first split off by itself.
        nfc: whether text is normalized to Unicode form C.
        ignore_merges: whether a word that is in the vocabulary becomes one token, whatever the merges.
        adds_bos: whether a text starts with BOS if the file does not say.
    """

    split: str | None
    splits_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = ByteLevelKind(
    _WORDS + r"|\p{N}{1,3}" + _SIGNS_AND_SPACES, ignore_merges=True, adds_bos=True
)
BYTE_LEVEL_KINDS = {
    "smollm": ByteLevelKind(None, splits_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": ByteLevelKind(_WORDS + r"|\p{N}" + _SIGNS_AND_SPACES, nfc=True),
    "gpt-2": ByteLevelKind(None),
    "tekken": ByteLevelKind(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        + _SIGNS_AND_SPACES.replace(r"[\r\n]*", r"[\r\n/]*", 1),
        ignore_merges=True,
        adds_bos=True,
    ),
}


def byte_level_bpe(
    kind: ByteLevelKind,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    adds_prefix_space: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer, without added tokens and without a post-processor."""
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.ignore_merges)
    tokenizer = Tokenizer(model)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = []
    if kind.splits_digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.split is not None:
        splits.append(pre_tokenizers.Split(Regex(kind.split), behavior="isolated"))
    by_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=adds_prefix_space, use_regex=kind.split is None
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What SentencePiece does to a text before it is split.

    Attributes:
        adds_prefix: whether each piece of text between special tokens gets a space in front.
        only_first: whether only the first piece does, and not if it has one (transformers' `legacy=False`).
        collapses_spaces: whether outer spaces are dropped, and runs of inner ones become one.
    """

    adds_prefix: bool = True
    only_first: bool = False
    collapses_spaces: bool = False


def sentencepiece_bpe(
    model: models.BPE, how: Normalization, whole_pieces: Sequence[str] = ()
) -> Tokenizer:
    """A SentencePiece BPE tokenizer, without added tokens and without a post-processor.

    Args:
        model: vocabulary and merges.
        how: what is done to the text.
        whole_pieces: the model's user-defined pieces, which it takes whole, wherever they stand. They need
            a model with `ignore_merges`.
    """
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if how.collapses_spaces:
        # At the end SentencePiece also drops the character that it writes for spaces.
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    splits: list[Any] = []
    if how.only_first:
        scheme = "first" if how.adds_prefix else "never"
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
    else:
        steps += [normalizers.Prepend(SPACE)] if how.adds_prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
    if whole_pieces:
        longest_first = sorted(whole_pieces, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if splits:
        tokenizer.pre_tokenizer = splits[0] if len(splits) == 1 else pre_tokenizers.Sequence(splits)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*back, *([decoders.Strip(" ", 1, 0)] if how.adds_prefix else [])]
    )
    return tokenizer


def merges_by_rank(ids: Mapping[str, int], order: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The merges that a ranked vocabulary defines: every split of a token into two tokens is one.

    Args:
        ids: token -> id of the tokens that may be merged or come from a merge.
        order: these tokens, highest priority first.
    """
    token_of = {i: token for token, i in ids.items()}
    for token in order:
        cuts = []
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                cuts.append((left, right))
        for left, right in sorted(cuts):
            yield token_of[left], token_of[right]


def merge_pair(merge: str) -> tuple[str, str]:
    """The two parts of a merge that is written with a space between them."""
    left, right = merge.split(" ")
    return left, right
