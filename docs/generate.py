#!/usr/bin/env python3
"""Renews the parts of the pages that follow from the code.

    .venv/bin/python docs/generate.py            writes them
    .venv/bin/python docs/generate.py --check    names the pages that are stale, and exits with 1

A page has a line `<!-- generated: NAME -->` before such a part and `<!-- end -->` behind it. `PARTS`
says what makes it. A test runs the check.
"""

import csv
import importlib
import json
import re
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from absl import flags
from tokenizers import AddedToken

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chat_templates  # noqa: E402 - of tests/
import family_models  # noqa: E402 - of tests/
import tiny_models  # noqa: E402 - of tests/

import jaxgrad  # noqa: E402
from jaxgrad import command_line  # noqa: E402
from jaxgrad.analysis import statistics  # noqa: E402
from jaxgrad.checkpoints.gguf_families import GGUF_FAMILIES  # noqa: E402
from jaxgrad.data.tokens import Protocol, tokenize  # noqa: E402
from jaxgrad.gradients.loss import LOSSES  # noqa: E402
from jaxgrad.models.families import FAMILIES  # noqa: E402
from jaxgrad.results import columns  # noqa: E402

_PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def column_table(declared: Iterable[columns.Column]) -> str:
    """What columns are, as `results.columns` declares them."""
    return table(
        ("column", "type", "unit", "what it is", "source", "null when"),
        (
            (
                f"`{c.name}`",
                type_name(c.type),
                c.unit,
                c.definition,
                c.source,
                c.null_when or "never",
            )
            for c in declared
        ),
    )


def type_name(kind: pa.DataType) -> str:
    """A column's type in words."""
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def derived_statistics() -> str:
    """What the analysis computes from columns."""
    return table(
        ("statistic", "unit", "what it is", "made of", "undefined when", "source", "for `--loss`"),
        (
            (
                f"`{one.name}`",
                one.unit,
                one.definition,
                ", ".join(f"`{name}`" for name in one.columns),
                one.undefined_when or "never",
                one.source,
                ", ".join(one.losses) or "any",
            )
            for one in statistics.DERIVED
        ),
    )


def losses() -> str:
    """The values of --loss."""
    return table(
        ("`--loss`", "what it is", "unit", "source"),
        ((f"`{loss.name}`", loss.definition, loss.unit, loss.source) for loss in LOSSES.values()),
    )


def families() -> str:
    """The families, and what each was held against."""
    tiny = Counter(model.model_type for model in family_models.MODELS.values())
    tiny["llama"] += len(tiny_models.ZOO)
    published: dict[str, list[str]] = {}
    entries = json.loads((ROOT / "tests" / "published_configs.json").read_text("utf-8"))
    for name, entry in entries.items():
        published.setdefault(entry["model_type"], []).append(name)
    in_gguf = {family.model_type: "yes" for family in GGUF_FAMILIES.values()}
    in_gguf["mistral"] = "as `llama`"  # llama.cpp's converter has one name for both
    return table(
        ("models", "`model_type`", "tiny models", "published sizes", "GGUF"),
        (
            (
                family.title,
                f"`{family.model_type}`",
                str(tiny[family.model_type]),
                ", ".join(published.get(family.model_type, ["none"])),
                in_gguf.get(family.model_type, "no"),
            )
            for family in FAMILIES.values()
        ),
    )


def command_flags(name: str) -> str:
    """A command's flags, from its --help."""
    command = importlib.import_module(f"jaxgrad.commands.{name}")
    groups = command.define_flags()
    parts = []
    for group in groups:
        shown = [(command_line.flag_usage(flag, flags.FLAGS[flag]), flag) for flag in group.names]
        rows = [
            (
                f"`--{usage.partition('  (default: ')[0]}`",
                usage.partition("  (default: ")[2].removesuffix(")"),
                command_line.flag_meaning(flags.FLAGS[flag]),
            )
            for usage, flag in shown
        ]
        parts.append(f"{group.title}:\n\n" + table(("flag", "default", "what it does"), rows))
    for flag in {flag for group in groups for flag in group.names}:
        delattr(flags.FLAGS, flag)  # the next command has one of the same name
    return "\n".join(parts)


def ledger() -> str:
    """docs/ledger.csv, without the device where that is the usual one."""
    with (DOCS / "ledger.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return table(
        ("what", "prediction", "measured", "date, commit"),
        (
            (
                row["what"],
                row["prediction"],
                row["measured"] + (" (shared)" if row["device"].endswith("shared") else ""),
                f"{row['date']}, {row['commit']}",
            )
            for row in rows
        ),
    )


# Page -> the names of its parts -> what makes them.
# What docs/tokens.md shows: title -> record, and options beyond the protocol.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "An instruction and its output": ({"instruction": "Why?", "output": "So."}, {}),
    "Messages with a system message": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        {},
    ),
    "Reasoning": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So.", "reasoning_content": "Because so."},
            ]
        },
        {},
    ),
    "A tool call as the reply": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "rain", "arguments": {}}}
                    ],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "rain"}}],
        },
        {},
    ),
    "Several turns": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": "Because."},
            ]
        },
        {"turns": "all"},
    ),
    "Plain text": ({"text": "Why? Because."}, {}),
    "Tokens": ({"input_ids": [0, 309, 33, 310, 16], "labels": [-100, -100, 33, -100, 16]}, {}),
}
_WORDS = ("Why", "So", "Because", "Rain", "rain", "brief", "system", "user", "assistant", "tools")
_MORE_WORDS = ("function", "name", "type", "arguments", "helpful", "You", " are")


def token_forms() -> str:
    """Each form of a record, its tokens by both protocols, the targets in brackets."""
    tokenizer = chat_templates.tokenizer_with(chat_templates.plain("Qwen3"))
    tokenizer.add_tokens([AddedToken(word) for word in (*_WORDS, *_MORE_WORDS)])
    text = ""
    for title, (record, more) in FORMS.items():
        text += f"### {title}\n\n```json\n{json.dumps(record)}\n```\n\n```\n"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.json"
            path.write_text(json.dumps([record]), "utf-8")
            (example,) = jaxgrad.read_examples(path).examples
        runs = [("paper", "last"), ("clean", "last")]
        runs += [("clean", more["turns"])] if more else []
        for protocol, turns in runs:
            item = tokenize(example, tokenizer, Protocol(protocol, True, turns=turns))
            targets = set(item.targets.tolist())
            words = [_shown(tokenizer.decode([token])) for token in item.token_ids]
            line = " ".join(f"[{w}]" if t in targets else w for t, w in enumerate(words))
            name = protocol + (", --turns=all" if turns == "all" else "")
            text += textwrap.fill(f"{name}: {line}", 110, break_on_hyphens=False) + "\n"
        text += "```\n\n"
    return text.rstrip("\n") + "\n"


def _shown(token: str) -> str:
    """A token with its white space to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎")


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "results.md": {
        "examples": lambda: column_table(columns.EXAMPLES),
        "matrices": lambda: column_table(columns.MATRICES),
        "statistics": derived_statistics,
        "losses": losses,
    },
    "models.md": {"families": families},
    "command_line.md": {
        name: lambda name=name: command_flags(name)
        for name in ("analyze", "study", "report", "compare", "convert", "export")
    },
    "ledger.md": {"ledger": ledger},
    "tokens.md": {"forms": token_forms},
}


def renewed(page: str) -> str:
    """A page's text with its parts made anew.

    Raises:
        ValueError: the page lacks a part, or has one that nobody makes.
    """
    text = (DOCS / page).read_text("utf-8")
    found = [match[2] for match in _PART.finditer(text)]
    if sorted(found) != sorted(PARTS[page]):
        raise ValueError(f"docs/{page} has the parts {found}, and is to have {list(PARTS[page])}")
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[page][part[2]]()}\n{part[3]}", text)


def main() -> int:
    """Write the pages, or check them."""
    stale = [page for page in PARTS if renewed(page) != (DOCS / page).read_text("utf-8")]
    for page in stale:
        if "--check" in sys.argv:
            print(f"docs/{page} is stale: run .venv/bin/python docs/generate.py")
        else:
            (DOCS / page).write_text(renewed(page), "utf-8")
            print(f"renewed docs/{page}")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
