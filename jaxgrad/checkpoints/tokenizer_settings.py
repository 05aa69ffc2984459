"""What a directory says of its tokenizer beside tokenizer.json: special tokens, chat templates, truncation.

They come from where transformers takes them. tokenizer_config.json counts; special_tokens_map.json and
added_tokens.json, which older versions wrote, count only where it has no `added_tokens_decoder`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jaxgrad.checkpoints.sources import read_json_object
from jaxgrad.errors import UserError

CONFIG, SPECIAL, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DECODER = "added_tokens_decoder"  # an entry of tokenizer_config.json: id -> token
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"  # of models that take images, too
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# Settings of the tokenizer that change no rule. Others are not handed on.
_OPTIONS = ("model_max_length", "truncation_side", "padding_side")


@dataclasses.dataclass(frozen=True)
class StatedToken:
    """A token that a file beside tokenizer.json names.

    Attributes:
        content: the token.
        file: the file that names it.
        token_id: its id; None if the file does not say.
        flags: those of `FLAGS` that the file gives.
        special: whether it is a special token.
    """

    content: str
    file: str
    token_id: int | None = None
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    special: bool = True

    def added_token(self) -> AddedToken:
        """The token as the `tokenizers` library takes it; what is not said is transformers' default."""
        flags = {"normalized": not self.special} | self.flags
        return AddedToken(self.content, special=self.special, **flags)


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a directory's tokenizer.

    Attributes:
        config: tokenizer_config.json; empty if there is none.
        named: special tokens by transformers' names (bos_token, image_token, ...).
        extra: special tokens without a name.
        stated: all tokens that the files name, each once.
        options: settings that transformers' class takes as they are.
        chat_template: one template, or several by name; None for none.
    """

    config: dict[str, Any]
    named: dict[str, str]
    extra: list[str]
    stated: list[StatedToken]
    options: dict[str, Any]
    chat_template: str | dict[str, str] | None

    @property
    def templates(self) -> list[str]:
        """The texts of all templates."""
        if self.chat_template is None:
            return []
        if isinstance(self.chat_template, str):
            return [self.chat_template]
        return list(self.chat_template.values())


def read_settings(directory: Path) -> TokenizerSettings:
    """The settings that the files of a directory give.

    Raises:
        UserError: a file cannot be read, or an entry is not of the kind that it must be.
    """
    config = _object(directory / CONFIG)
    has_decoder = DECODER in config
    source, where = config, CONFIG
    if not has_decoder and (directory / SPECIAL).exists():
        source, where = config | _object(directory / SPECIAL), SPECIAL
    place = directory / where
    named = {
        name: _content(value, place, name)
        for name, value in source.items()
        if value is not None
        and (name in _NAMED or (name.endswith("_token") and isinstance(value, str | dict)))
    }
    extra = []
    for name in _EXTRA:
        listed = source.get(name) or []
        if isinstance(listed, dict):
            named |= {key: _content(value, place, name) for key, value in listed.items()}
        elif isinstance(listed, list):
            extra += [_content(value, place, name) for value in listed]
        else:
            raise _wrong(place, name, listed, "a list of tokens")
    special = {*named.values(), *extra}
    stated = {token: StatedToken(token, where) for token in (*named.values(), *extra)}
    if has_decoder:
        stated |= {token.content: token for token in _decoder(config[DECODER], directory / CONFIG)}
    else:
        stated |= {
            token.content: token for token in _added_file(directory / ADDED, special=special)
        }
    options = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
    return TokenizerSettings(
        config, named, extra, list(stated.values()), options, _chat_template(directory, config)
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _wrong(place: Path, name: str, value: Any, wanted: str) -> UserError:
    return UserError(
        f"{place}: {name} is {str(value)[:60]!r}, not {wanted}; download the file again"
    )


def _content(value: Any, place: Path, name: str) -> str:
    """A token that is written as text or as an object with its text."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise _wrong(place, name, value, "a token")
    return content


def _decoder(entries: Any, place: Path) -> Iterator[StatedToken]:
    if not isinstance(entries, dict):
        raise _wrong(place, DECODER, entries, "an object of tokens by id")
    for key, value in entries.items():
        content = _content(value, place, DECODER)
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise _wrong(place, f"{DECODER}'s key", key, "an id")
        given = value if isinstance(value, dict) else {}
        flags = {flag: bool(given[flag]) for flag in FLAGS if flag in given}
        yield StatedToken(content, place.name, int(key), flags, bool(given.get("special", True)))


def _added_file(place: Path, *, special: set[str]) -> Iterator[StatedToken]:
    for content, token_id in _object(place).items():
        if not isinstance(token_id, int):
            raise _wrong(place, content[:60], token_id, "an id")
        yield StatedToken(content, place.name, token_id, special=content in special)


def _chat_template(directory: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The templates: files of templates go before tokenizer_config.json, and this before a processor's."""
    found = _as_templates(config.get("chat_template"), directory / CONFIG)
    if not found:
        processor = directory / PROCESSOR_TEMPLATE
        found = _as_templates(_object(processor).get("chat_template"), processor)
    for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
        found[path.stem] = _text(path)
    if (directory / TEMPLATE_FILE).exists():
        found["default"] = _text(directory / TEMPLATE_FILE)
    if found.keys() == {"default"}:
        return found["default"]
    return found or None


def _as_templates(value: Any, place: Path) -> dict[str, str]:
    """Templates as configs have them: one text, or a list of objects with name and template."""
    if isinstance(value, str):
        return {"default": value}
    if value is None:
        return {}
    items = value if isinstance(value, list) else [value]
    if not all(
        isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("template"), str)
        for item in items
    ):
        raise _wrong(place, "chat_template", value, "a text or a list of {name, template}")
    return {item["name"]: item["template"] for item in items}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); download it again") from error
