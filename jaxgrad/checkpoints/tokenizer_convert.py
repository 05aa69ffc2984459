"""Directories without tokenizer.json: older vocabulary files, converted by the rule of their class.

| files | classes | rule |
|---|---|---|
| tokenizer.model (SentencePiece BPE) | Llama's, Code Llama's, Gemma's | what the SentencePiece model does |
| vocab.json, merges.txt | GPT-2's | GPT-2's splitting of words |
| vocab.json, merges.txt | Qwen 2's | Qwen 2's, after Unicode form C |

All others are refused: what a class of another name does to a text stands in code, not in these files.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, processors

from jaxgrad.checkpoints import sentencepiece_file
from jaxgrad.checkpoints.sentencepiece_file import SentencePieceModel, read_sentencepiece
from jaxgrad.checkpoints.sources import read_json_object
from jaxgrad.checkpoints.tokenizer_rules import (
    BYTE_LEVEL_KINDS,
    Normalization,
    byte_level_bpe,
    merge_pair,
    merges_by_rank,
    sentencepiece_bpe,
)
from jaxgrad.checkpoints.tokenizer_settings import TokenizerSettings
from jaxgrad.errors import UserError

MODEL, VOCABULARY, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
# Vocabularies that only code of their own can read, or whose splitting rule stands in code.
SLOW_ONLY = ("tiktoken.model", "*.tiktoken", "tekken.json", "spiece.model", "vocab.txt")

_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_BYTE_LEVEL = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
# The class where no file names one, by model_type.
_CLASS_OF = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "phi3": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_MEND = (
    "add the tokenizer.json of the model that this one was made from, or write one with the program that "
    "made the model"
)


def convert_vocabulary(directory: Path, settings: TokenizerSettings) -> tuple[Tokenizer, str]:
    """The tokenizer of a directory without tokenizer.json, and the rule that made it, in words.

    Sets what the class has by default: the special tokens of a SentencePiece model, in `settings.named`.

    Raises:
        UserError: there is no vocabulary, or none whose rule is known.
    """
    name = _class_name(directory, settings)
    if (directory / MODEL).exists():
        path = directory / MODEL
        model = read_sentencepiece(path)
        if model is None:
            raise UserError(
                f"{path} is no SentencePiece model (tiktoken's do not say how words are split); {_MEND}"
            )
        if name not in _SENTENCEPIECE:
            raise _unknown_class(directory, MODEL, name, _SENTENCEPIECE)
        backend = _from_sentencepiece(path, model, name, settings)
        if name == "GemmaTokenizer" or settings.config.get("legacy") is not False:
            return backend, f"{MODEL}, converted by the rule of {name}"
        return backend, f"{MODEL}, converted by the rule of {name} with legacy=False"
    if (directory / VOCABULARY).exists() and (directory / MERGES).exists():
        if name not in _BYTE_LEVEL:
            raise _unknown_class(directory, f"{VOCABULARY} and {MERGES}", name, tuple(_BYTE_LEVEL))
        backend = _from_merges(directory, _BYTE_LEVEL[name], settings)
        return backend, f"{VOCABULARY} and {MERGES}, converted by the rule of {name}"
    slow = [path.name for pattern in SLOW_ONLY for path in sorted(directory.glob(pattern))]
    if slow:
        raise UserError(f"{directory}: the tokenizer is a slow one ({slow[0]}); {_MEND}")
    if (directory / VOCABULARY).exists():
        raise UserError(f"{directory}: the tokenizer has {VOCABULARY}, but no {MERGES}; {_MEND}")
    raise UserError(
        f"{directory} has no tokenizer: tokenizer.json is missing; copy the tokenizer's files from the "
        "model that this one was made from"
    )


def _class_name(directory: Path, settings: TokenizerSettings) -> str | None:
    """The class that the directory names, without "Fast"; by its model_type if it names none."""
    config = directory / "config.json"
    raw = read_json_object(config) if config.exists() else {}
    for source in (settings.config, raw):
        name = source.get("tokenizer_class")
        if isinstance(name, str):
            return name.removesuffix("Fast")
    kind = raw.get("model_type")
    return _CLASS_OF.get(kind) if isinstance(kind, str) else None


def _unknown_class(
    directory: Path, files: str, name: str | None, known: tuple[str, ...]
) -> UserError:
    named = "names no class" if name is None else f"names the class {name}"
    return UserError(
        f"{directory}: the tokenizer is a slow one: it has no tokenizer.json, only {files}, and {named}; "
        f"known for such files: {', '.join(known)}. Otherwise {_MEND}"
    )


def _from_sentencepiece(
    path: Path, model: SentencePieceModel, name: str, settings: TokenizerSettings
) -> Tokenizer:
    unlike = [
        what
        for what, there in {
            "another kind than BPE": model.kind != sentencepiece_file.BPE,
            "no bytes to fall back on": not model.byte_fallback,
            "spaces behind words": model.space_behind,
            "spaces that are kept as they are": not model.escapes_spaces,
            # The tokenizers library applies such a table otherwise to "\r\n" and other clusters.
            "a table that normalizes characters": bool(model.charsmap),
        }.items()
        if there
    ]
    if unlike:
        raise UserError(f"{path} is a SentencePiece model with {', '.join(unlike)}; {_MEND}")
    tokens = [piece for piece, _, _ in model.pieces]
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path} has a piece twice; download it again")
    whole = model.of_type(sentencepiece_file.USER_DEFINED)
    kinds = (sentencepiece_file.NORMAL,)
    ids = {token: i for i, (token, _, kind) in enumerate(model.pieces) if kind in kinds}
    order = sorted(ids, key=lambda token: (-model.pieces[ids[token]][1], ids[token]))
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges_by_rank(ids, order)),
        unk_token=tokens[model.unknown_id],
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=bool(whole),
    )
    config = settings.config
    stated = config.get("add_prefix_space")
    how = Normalization(
        adds_prefix=stated if isinstance(stated, bool) else model.adds_prefix,
        only_first=name != "GemmaTokenizer" and config.get("legacy") is False,
        collapses_spaces=model.collapses_spaces,
    )
    backend = sentencepiece_bpe(bpe, how, whole)
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in model.of_type(sentencepiece_file.CONTROL, sentencepiece_file.UNKNOWN)
        ]
    )
    for ours, piece in (("bos", model.bos_id), ("eos", model.eos_id), ("unk", model.unknown_id)):
        if 0 <= piece < len(tokens) and config.get(f"{ours}_token", "") is not None:
            settings.named.setdefault(f"{ours}_token", tokens[piece])
    _add_stated(backend, settings, path)
    _add_ends(backend, settings, adds_bos=True)
    return backend


def _from_merges(directory: Path, kind: str, settings: TokenizerSettings) -> Tokenizer:
    vocabulary: dict[str, Any] = read_json_object(directory / VOCABULARY)
    path = directory / MERGES
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        merges = [merge_pair(line.rstrip("\r")) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error
    backend = byte_level_bpe(
        BYTE_LEVEL_KINDS[kind],
        vocabulary,
        merges,
        adds_prefix_space=settings.config.get("add_prefix_space") is True,
    )
    if not settings.named and not settings.stated and "<|endoftext|>" in vocabulary:
        # The classes' own special token, where no file names any.
        names = ("bos_token", "eos_token") if kind == "gpt-2" else ("eos_token",)
        settings.named.update(dict.fromkeys(names, "<|endoftext|>"))
    _add_stated(backend, settings, directory)
    _add_ends(backend, settings, adds_bos=False)
    return backend


def _add_stated(backend: Tokenizer, settings: TokenizerSettings, where: Path) -> None:
    """Add the tokens that the other files name, each with the id that they give it.

    Raises:
        UserError: it gets another id.
    """
    tokens = {token.content: token.added_token() for token in settings.stated}
    for content in settings.named.values():
        tokens.setdefault(content, AddedToken(content, normalized=False, special=True))
    ids = {token.content: token.token_id for token in settings.stated}
    size = backend.get_vocab_size(with_added_tokens=False)
    order = sorted(tokens, key=lambda t: (ids.get(t) is None, ids.get(t) or 0))
    for content in order:
        backend.add_tokens([tokens[content]])
    wrong = {
        content: token_id
        for content, token_id in ids.items()
        if token_id is not None and backend.token_to_id(content) != token_id
    }
    if wrong:
        content, token_id = next(iter(wrong.items()))
        raise UserError(
            f"{where}: {content!r} gets the id {backend.token_to_id(content)} behind a vocabulary of "
            f"{size} tokens, and other files say {token_id}; {_MEND}"
        )


def _add_ends(backend: Tokenizer, settings: TokenizerSettings, *, adds_bos: bool) -> None:
    """Let a text start with BOS and end with EOS, as tokenizer_config.json says."""
    wanted = {"bos": adds_bos, "eos": False}
    ends: dict[str, list[str]] = {}
    for name, default in wanted.items():
        stated = settings.config.get(f"add_{name}_token")
        token = settings.named.get(f"{name}_token")
        adds = (stated if isinstance(stated, bool) else default) and token is not None
        ends[name] = [token] if adds and token is not None else []
    if ends["bos"] or ends["eos"]:
        names = {*ends["bos"], *ends["eos"]}
        backend.post_processor = processors.TemplateProcessing(
            single=[*ends["bos"], "$A", *ends["eos"]],
            special_tokens=[(token, backend.token_to_id(token)) for token in names],
        )
