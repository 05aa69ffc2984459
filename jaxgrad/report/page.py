"""The report's page: one HTML file that works offline and sends no request.

Text from data is escaped everywhere: jinja2 escapes it, and the script sets text, never markup. The page's
content security policy allows no request, and only the two scripts whose digests it names: the page's own
and plotly.js.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from jaxgrad.errors import UserError
from jaxgrad.report.comparisons import Report
from jaxgrad.report.findings import Finding
from jaxgrad.report.page_data import (
    Block,
    core_block,
    curve_blocks,
    fitting,
    pack,
    rd_blocks,
    similarity_blocks,
)
from jaxgrad.report.page_examples import example_blocks
from jaxgrad.report.style import loss_words
from jaxgrad.report.tables import Number, Table, compact, written
from jaxgrad.results.files import atomic_file

# Bytes of the whole page: mail servers, repositories and phones still accept that much.
LIMIT = 5_000_000
# Of these the tables get at most the first, and the examples at least the second.
TABLES_LIMIT = 1_200_000
EXAMPLES_SHARE = 500_000
# For what is added at the end: the sentences on what is left out, and the core block's list of blocks.
_SLACK = 40_000
# So many tables are unfolded at first.
_OPEN_TABLES = 3
_SCRIPTS = ("core.js", "panels.js", "curves.js", "tables.js", "examples.js", "start.js")


@dataclass(frozen=True)
class PageSize:
    """What became of the page.

    Attributes:
        num_bytes: Of the file.
        examples: Examples in it.
        all_examples: Examples of the report.
        left_out: What did not fit, as the page says it.
    """

    num_bytes: int
    examples: int
    all_examples: int
    left_out: tuple[str, ...]


def write_page(
    report: Report, tables: Sequence[Table], findings: Sequence[Finding], path: str | Path
) -> PageSize:
    """Writes a report as one self-contained HTML file of less than `LIMIT` bytes.

    What does not fit is left out, and the page says so. The order: tables up to `TABLES_LIMIT`, curves one
    statistic after the other, RD, similarity matrices, and as many examples as the rest allows.

    Args:
        report: The report.
        tables: In the order in which they are read.
        findings: Likewise.
        path: The file; it appears whole or not at all.

    Raises:
        UserError: The words and names alone are more than `LIMIT` bytes.
    """
    library = plotly.offline.get_plotlyjs()
    shown, too_large = _tables(tables)
    left_out = [f"the table “{table.title}” (its own file has it)" for table in too_large]
    library_block = Block("plotly", pack(library))
    parts: dict[str, Any] = {
        "report": report,
        "loss": loss_words(report.loss_name),
        "tables": shown,
        "findings": findings,
        "facts": _facts(report),
        "provenance": _provenance(report),
        "left_out_cells": [cell for cell in report.cells if cell.examples.left_out],
        "plotly_version": _plotly_version(library),
        "level": f"{100 * report.resampling.level:g} %",
        "examples": (0, 0),
        "left_out": left_out,
    }
    words = len(_html(parts, library, [library_block, core_block(report, {})]).encode())
    room = LIMIT - words - _SLACK
    if room < 0:
        raise UserError(
            f"The page's words and tables alone are {words} bytes, more than {LIMIT}. "
            "Report fewer runs at a time."
        )
    blocks = [library_block]
    share = min(EXAMPLES_SHARE, room // 3)
    for candidates in (curve_blocks(report), rd_blocks(report), similarity_blocks(report)):
        inside, outside = fitting(candidates, room - share)
        room -= sum(item.num_bytes for item in inside)
        blocks += inside
        left_out += _summed(outside)
    chosen = example_blocks(report, room)
    blocks += chosen.blocks
    parts["examples"] = (chosen.embedded, chosen.total)
    blocks.append(core_block(report, {"blocks": [item.name for item in blocks]}))
    html = _html(parts, library, blocks).encode()
    assert len(html) < LIMIT, f"{len(html)} bytes: more than was planned"
    with atomic_file(Path(path)) as file:
        file.write(html)
    return PageSize(len(html), chosen.embedded, chosen.total, tuple(left_out))


def _plotly_version(library: str) -> str:
    found = re.search(r"plotly\.js v([\d.]+)", library[:200])
    return found[1] if found else ""


def _summed(outside: Sequence[Block]) -> list[str]:
    """What is left out; where that is much, the first four and a count."""
    whats = [item.what for item in outside]
    return whats if len(whats) <= 5 else [*whats[:4], f"{len(whats) - 4} more such parts"]


def visible(value: Any) -> Any:
    """Makes text safe for UTF-8 and HTML: lone surrogates and control characters become U+FFFD."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", value)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jaxgrad.report", "page"),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _asset(name: str) -> str:
    return resources.files("jaxgrad.report").joinpath("page", name).read_text("utf-8")


def _html(parts: Mapping[str, Any], library: str, blocks: Sequence[Block]) -> str:
    # One scope: the script adds no name to the page.
    script = '(() => {\n"use strict";\n' + "".join(map(_asset, _SCRIPTS)) + "})();\n"
    return (
        _environment()
        .get_template("template.html")
        .render(
            parts,
            blocks=blocks,
            # Our own files, not data.
            style=Markup(_asset("page.css")),
            script=Markup(script),
            digests=[_digest(script), _digest(library)],
        )
    )


def _digest(script: str) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tables(tables: Sequence[Table]) -> tuple[list[Markup], list[Table]]:
    """The tables as HTML, as many as fit; and the others."""
    template = _environment().get_template("table.html")
    shown, too_large, room = [], [], TABLES_LIMIT
    for place, table in enumerate(map(compact, tables)):
        html = template.render(
            place=place,
            open=place < _OPEN_TABLES,
            table=table,
            groups=_groups(table),
            number=lambda value: isinstance(value, Number),
            parts=_parts,
            numeric=[
                any(isinstance(row[c], Number) for row in table.rows)
                for c in range(len(table.columns))
            ],
        )
        size = len(html.encode())
        if size > room:
            too_large.append(table)
            continue
        room -= size
        shown.append(Markup(html))
    return shown, too_large


def _parts(number: Number) -> tuple[str, str]:
    """A number as the table writes it, and its limits."""
    value = written(number.value, number.form)
    return value, number.text[len(value) :].strip()


def _groups(table: Table) -> list[tuple[str, int]]:
    """Neighbouring columns of one group: its name and their number; empty without groups."""
    groups: list[tuple[str, int]] = []
    for column in table.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return groups if any(name for name, _ in groups) else []


def _facts(report: Report) -> list[tuple[str, str]]:
    """The sizes of the report: number, and of what."""

    def counted(count: int, one: str, many: str) -> tuple[str, str]:
        return f"{count:,}".replace(",", "\u202f"), one if count == 1 else many

    used = sum(cell.examples.num_examples for cell in report.cells)
    out = sum(len(cell.examples.left_out) for cell in report.cells)
    return [
        counted(len(report.models()), "model", "models"),
        counted(len(report.data_sets()), "data set", "data sets"),
        counted(len(report.cells), "run", "runs"),
        counted(used, "example used", "examples used"),
        counted(out, "example left out", "examples left out"),
    ]


def _provenance(report: Report) -> list[tuple[str, list[str]]]:
    """What the runs say about themselves: words -> titles of the runs that say so."""
    groups: dict[str, list[str]] = {}
    for cell in report.cells:
        words = "; ".join(_run_words(cell.examples.run))
        groups.setdefault(words, []).append(f"{cell.role.model}, {cell.role.title}")
    return list(groups.items())


def _run_words(run: Mapping[str, Any]) -> list[str]:
    """Protocol, versions, commit and device of a run, without any path of its machine."""
    options = run.get("identity", {}).get("options", {})
    sessions = run.get("sessions") or [{}]
    info = sessions[-1].get("info", {})
    words = []
    if "protocol" in options:
        words.append(f"protocol {options['protocol']}")
    for name, title in (("max_length", "at most {} tokens"), ("dtype", "{}"), ("chat", "chat: {}")):
        if name in options:
            words.append(title.format(options[name]))
    if info.get("model"):
        words.append(f"model {info['model']}")
    if info.get("device"):
        words.append(f"on {info['device'].get('kind', 'an unknown device')}")
    versions = info.get("versions") or {}
    if versions:
        words.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    if info.get("commit"):
        words.append(f"commit {str(info['commit'])[:12]}")
    if run.get("finished_at"):
        words.append(f"finished {str(run['finished_at'])[:10]}")
    return words or ["statistics without provenance (the authors' form)"]
