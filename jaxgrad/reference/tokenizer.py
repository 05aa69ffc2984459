"""The reference's tokenizer: tokenizer.json as the `tokenizers` library reads it, and nothing of ours.

It reads the directory a second time, with code of its own, so that a fault in `jaxgrad.checkpoints` shows
as other tokens. It has what `encoding.encode_example` and `jaxgrad.data.tokens` ask of a tokenizer.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokenizer:
    """The tokenizer of a directory with tokenizer.json.

    Attributes:
        chat_template: the text of the template, or several by name; None if there is none.
        special_tokens_map: name -> special token, as templates get them.
        truncation_side: where a text is cut.
    """

    is_fast = True

    def __init__(self, directory: Path) -> None:
        self.name_or_path = str(directory)
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        cut = self._tokenizer.truncation
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _load(directory / "tokenizer_config.json")
        given = config
        if "added_tokens_decoder" not in config:
            given = config | _load(directory / "special_tokens_map.json")
        self.special_tokens_map = {
            name: _as_text(given[name]) for name in NAMES if given.get(name) is not None
        }
        side = "right" if cut is None else cut["direction"]
        self.truncation_side = config.get("truncation_side") or side
        self.chat_template = _template(directory, config)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> list[int]:
        """Token ids of a text, with what the file's post-processor adds."""
        return self(
            text,
            add_special_tokens=add_special_tokens,
            truncation=truncation,
            max_length=max_length,
        )["input_ids"]

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        verbose: bool = True,
        **others: Any,
    ) -> dict[str, list]:
        """The ids, and the offsets [begin, end) and the mask of added tokens if they are asked for."""
        if others:
            raise TypeError(f"the reference's tokenizer does not know {', '.join(others)}")
        if truncation and max_length is not None:
            self._tokenizer.enable_truncation(max_length, direction=self.truncation_side)
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._tokenizer.no_truncation()
        result: dict[str, list] = {"input_ids": found.ids}
        if return_offsets_mapping:
            result["offset_mapping"] = found.offsets
        if return_special_tokens_mask:
            result["special_tokens_mask"] = found.special_tokens_mask
        return result

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template's text."""
        template = chat_template or self.chat_template
        if isinstance(template, dict):
            name = "tool_use" if tools is not None and "tool_use" in template else "default"
            template = template.get(name)
        if template is None:
            raise ValueError("there is no chat template of that name")
        return template

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list | None = None,
        documents: list | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the template renders it. Templates run in Jinja's sandbox."""
        if tokenize:
            raise ValueError("the reference renders text only")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = datetime.datetime.now().strftime
        return environment.from_string(self.get_chat_template(chat_template, tools)).render(
            messages=conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **(self.special_tokens_map | variables),
        )


def reference_tokenizer(path: Path, ours: Any) -> tuple[Any, str]:
    """The tokenizer for the reference and a line that says which it is.

    Args:
        path: the directory or the GGUF file of the model's tokenizer.
        ours: the model's own, taken where there is no tokenizer.json to read.
    """
    if path.is_dir() and (path / "tokenizer.json").exists():
        return FileTokenizer(path), "reference: tokens by tokenizer.json, read by itself"
    what = "a GGUF file" if path.is_file() else "a model without tokenizer.json"
    return ours, f"reference: the same tokenizer, because {what} has no other"


class _Generation(jinja2.ext.Extension):
    """Templates mark the assistant's turns with {% generation %}, which prints nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _as_text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _template(directory: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    own = config.get("chat_template")
    own = own or _load(directory / "chat_template.json").get("chat_template") or {}
    if isinstance(own, list):
        own = {entry["name"]: entry["template"] for entry in own}
    named = own if isinstance(own, dict) else {"default": own}
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (directory / "chat_template.jinja").exists():
        files["default"] = directory / "chat_template.jinja"
    named |= {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return named["default"] if list(named) == ["default"] else named or None
