"""Tokenizers from a directory's files: what tokenizer.json says counts. GGUF: see `gguf_tokenizer`.

transformers' `AutoTokenizer` is not asked: from version 5 on it builds some tokenizers by the name of
their class and leaves out the file's own rules. Here the `tokenizers` library reads the file. transformers'
general class only holds it, with the special tokens and the chat template of the other files.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxgrad.checkpoints.tokenizer_convert import convert_vocabulary
from jaxgrad.checkpoints.tokenizer_settings import (
    FLAGS,
    StatedToken,
    TokenizerSettings,
    read_settings,
)
from jaxgrad.errors import UserError, is_panic

FILE = "tokenizer.json"
_LISTED = 4  # tokens that a note names


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and the rule by which it makes tokens.

    Attributes:
        tokenizer: with the special tokens and the chat template.
        rule: what decides the tokens, such as "tokenizer.json".
        notes: lines for the user: what other files say and what is not followed.
    """

    tokenizer: PreTrainedTokenizerFast
    rule: str
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What a run says of its tokens."""
        return [f"tokens by {self.rule}", *self.notes]

    def described(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        return {"rule": self.rule, "notes": list(self.notes)}


def tokenizer_from_directory(directory: Path) -> LoadedTokenizer:
    """The directory's tokenizer. No code from the directory runs.

    Raises:
        UserError: there is no tokenizer, it is broken or slow, its vocabulary is empty, it draws tokens at
            random, or the chat template prints a token that it does not have.
    """
    settings = read_settings(directory)
    path = directory / FILE
    try:
        if path.exists():
            backend, rule = Tokenizer.from_file(str(path)), FILE
            side = backend.truncation["direction"] if backend.truncation else None
            # These would cut and pad every text.
            backend.no_truncation()
            backend.no_padding()
            notes = _notes(settings, backend, directory)
        else:
            backend, rule = convert_vocabulary(directory, settings)
            side, notes = None, []
        if side is not None:
            settings.options.setdefault("truncation_side", side)
        loaded = LoadedTokenizer(hold(backend, settings, str(directory)), rule, tuple(notes))
    except UserError:
        raise
    except BaseException as error:  # a broken tokenizer may make the libraries raise anything
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        detail = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {detail}); "
            "download its files (tokenizer.json, tokenizer_config.json) again"
        ) from error
    _refuse_unusable(backend, directory)
    return loaded


def hold(backend: Tokenizer, settings: TokenizerSettings, name: str) -> PreTrainedTokenizerFast:
    """transformers' general class around a tokenizer, which it leaves as it is."""
    # The class adds tokens and may replace the post-processor while it is made. So it is made around
    # another tokenizer, and gets this one afterwards.
    held = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()),
        name_or_path=name,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=settings.extra,
        **settings.named,
        **settings.options,
    )
    held.chat_template = settings.chat_template
    held._tokenizer = backend
    return held


def _refuse_unusable(backend: Tokenizer, directory: Path) -> None:
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if backend.get_vocab().keys() <= added:
        raise UserError(f"{directory}: the tokenizer has no vocabulary; add its tokenizer.json")
    if getattr(backend.model, "dropout", None):
        raise UserError(
            f"{directory / FILE}: model.dropout is {backend.model.dropout}, so it draws its tokens at "
            'random; set "dropout": null there'
        )


def _notes(settings: TokenizerSettings, backend: Tokenizer, directory: Path) -> list[str]:
    """What the other files say against tokenizer.json, which counts.

    Raises:
        UserError: the chat template prints a token that another file names and tokenizer.json lacks.
    """
    added = backend.get_added_tokens_decoder()
    ids = {token.content: token_id for token_id, token in added.items()}
    missing = [token for token in settings.stated if token.content not in ids]
    _refuse_printed(missing, settings, directory)
    there = [token for token in settings.stated if token.content in ids]
    notes = []
    if missing:
        notes.append(
            f"{FILE} does not have {_listed(missing)} as a whole token: such text is split as any other"
        )
    moved = [t for t in there if t.token_id is not None and t.token_id != ids[t.content]]
    if moved:
        notes.append(f"{FILE} gives {_listed(moved)} another id, which counts")
    changed = [
        t for t in there if any(getattr(added[ids[t.content]], f) != v for f, v in t.flags.items())
    ]
    if changed:
        notes.append(
            f"{FILE} says otherwise how {_listed(changed)} is found in a text "
            f"({', '.join(FLAGS)}), which counts"
        )
    return notes + [
        f"tokenizer_config.json says {said}, {FILE} {does}, which counts"
        for said, does in _contradictions(settings, backend)
    ]


def _refuse_printed(
    missing: list[StatedToken], settings: TokenizerSettings, directory: Path
) -> None:
    text = "\n".join(settings.templates)
    names = {token: name for name, token in settings.named.items() if name in text}
    printed = [token for token in missing if token.content in text or token.content in names]
    if printed:
        raise UserError(
            f"{directory}: the chat template prints {_listed(printed)}, which {FILE} does not have as a "
            f"whole token; take all files from one place, or write the token into {FILE}: python -c "
            f"\"from transformers import PreTrainedTokenizerFast as T; T.from_pretrained('{directory}')"
            f".save_pretrained('{directory}')\""
        )


def _listed(tokens: list[StatedToken]) -> str:
    names = ", ".join(repr(token.content) for token in tokens[:_LISTED])
    more = f" and {len(tokens) - _LISTED} more" if len(tokens) > _LISTED else ""
    files = ", ".join(sorted({token.file for token in tokens}))
    return f"{names}{more} (in {files})"


def _contradictions(settings: TokenizerSettings, backend: Tokenizer) -> list[tuple[str, str]]:
    """Entries of tokenizer_config.json that tokenizer.json does not follow, with what it does."""
    config, found = settings.config, []
    ids, bare = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    for end, at in (("bos", 0), ("eos", -1)):
        stated, token = config.get(f"add_{end}_token"), settings.named.get(f"{end}_token")
        if isinstance(stated, bool) and token is not None and ids and len(ids) >= len(bare):
            adds = len(ids) > len(bare) and ids[at] == backend.token_to_id(token)
            if adds != stated:
                does = f"adds {'' if adds else 'no '}{token!r}"
                found.append((f"add_{end}_token = {_json(stated)}", does))
    prefix = config.get("add_prefix_space")
    first = [backend.id_to_token(i) for i in bare[:1]]
    if isinstance(prefix, bool) and first and first[0]:
        adds = first[0][0] in "\u2581\u0120"
        if adds != prefix:
            does = f"puts {'a' if adds else 'no'} space in front of a text"
            found.append((f"add_prefix_space = {_json(prefix)}", does))
    if config.get("split_special_tokens"):
        found.append(("split_special_tokens = true", "takes special tokens in a text whole"))
    if config.get("fix_mistral_regex"):
        found.append(("fix_mistral_regex = true", "keeps its splitting rule"))
    return found


def _json(value: Any) -> str:
    return str(value).lower()
