"""A table of numbers with intervals, and its forms: Markdown, CSV, LaTeX."""

import csv
import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Literal

Form = Literal["number", "percent", "count", "p"]
NOTHING = "–"

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "σ": r"$\sigma$",
        "·": r"$\cdot$",
        "|": r"\textbar{}",
        "≤": r"$\le$",
        "×": r"$\times$",
    }
)
_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\|`*_<>[]"})


@dataclass(frozen=True)
class Number:
    """A number of a table.

    Attributes:
        value: NaN where it is undefined.
        low, high: Its interval's limits; NaN where there is none.
        form: How it is written: three significant digits, percent, a count, or a p.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    form: Form = "number"

    @property
    def text(self) -> str:
        """The number with its limits: "1.15 [0.95, 1.31]"."""
        value = written(self.value, self.form)
        if math.isnan(self.low) or math.isnan(self.high):
            return value
        return f"{value} [{written(self.low, self.form)}, {written(self.high, self.form)}]"


Value = str | Number


@dataclass(frozen=True)
class Column:
    """A column: its name, and the group that it belongs to."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Stem of its files.
        title: Heading.
        caption: What stands in it and how it was made.
        columns: In order; those of a group are neighbours.
        rows: As many values as columns each.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.name}: a row has another number of values than columns")


def compact(table: Table) -> Table:
    """A table for people: without the column of models where there is only one."""
    keep = [
        place
        for place, column in enumerate(table.columns)
        if column.name != "model" or len({row[place] for row in table.rows}) > 1
    ]
    rows = tuple(tuple(row[place] for place in keep) for row in table.rows)
    columns = tuple(table.columns[place] for place in keep)
    return dataclasses.replace(table, columns=columns, rows=rows)


def written(value: float, form: Form = "number") -> str:
    """A number as people read it; an en dash for NaN.

    | form | 0.012345 |
    |---|---|
    | number | 0.0123 (three significant digits) |
    | percent | 1.2 % |
    | count | 0 |
    | p | 0.012; below 0.001 two significant digits |
    """
    if math.isnan(value):
        return NOTHING
    if form == "count":
        return f"{value:.0f}"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "p":
        return f"{value:.3f}" if value >= 0.001 else f"{value:.2g}"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:#.3g}".rstrip(".")
    if 999.5 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.2e}"


def as_markdown(table: Table) -> str:
    """GitHub's Markdown: title, `compact` table, caption. A column's name begins with its group's."""
    table = compact(table)
    head = [f"{c.group} {c.name}".strip() for c in table.columns]
    numeric = [_is_numeric(table, place) for place in range(len(head))]
    lines = [f"### {_markdown(table.title)}", ""]
    lines.append("| " + " | ".join(map(_markdown, head)) + " |")
    lines.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    for row in table.rows:
        # A number's brackets are ours, and a link needs parentheses after them.
        cells = [_markdown(v) if isinstance(v, str) else v.text for v in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _markdown(table.caption), ""])


def as_csv(table: Table) -> str:
    """Comma-separated, full precision. A number with limits has three columns: x, x low, x high."""
    limits = [any(_has_limits(row[c]) for row in table.rows) for c in range(len(table.columns))]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    head: list[str] = []
    for column, has in zip(table.columns, limits, strict=True):
        name = f"{column.group} {column.name}".strip()
        head += [name, f"{name} low", f"{name} high"] if has else [name]
    writer.writerow(head)
    for row in table.rows:
        line: list[str] = []
        for value, has in zip(row, limits, strict=True):
            if isinstance(value, str):
                line += [value, "", ""] if has else [value]
            else:
                numbers = (value.value, value.low, value.high) if has else (value.value,)
                line += ["" if math.isnan(number) else repr(float(number)) for number in numbers]
        writer.writerow(line)
    return sink.getvalue()


def as_latex(table: Table) -> str:
    """A `table*` with booktabs' rules; intervals in a smaller size. See `compact`."""
    table = compact(table)
    numeric = [_is_numeric(table, place) for place in range(len(table.columns))]
    groups = _groups(table)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}[t]",
        r"\centering\small",
        r"\resizebox{\textwidth}{!}{%",
        r"\begin{tabular}{" + "".join("r" if right else "l" for right in numeric) + "}",
        r"\toprule",
    ]
    if any(name for name, _, _ in groups):
        cells, rules = [], []
        for name, first, last in groups:
            width = last - first + 1
            cells += [rf"\multicolumn{{{width}}}{{c}}{{{_latex(name)}}}"] if name else [""] * width
            if name:
                rules.append(rf"\cmidrule(lr){{{first + 1}-{last + 1}}}")
        lines += [" & ".join(cells) + r" \\", "".join(rules)]
    lines.append(" & ".join(_latex(column.name) for column in table.columns) + r" \\")
    lines.append(r"\midrule")
    for row in table.rows:
        lines.append(" & ".join(map(_latex_value, row)) + r" \\")
    lines += [
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\caption{{{_latex(table.title)}. {_latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _groups(table: Table) -> list[tuple[str, int, int]]:
    """Runs of columns of one group: name, first and last place."""
    found: list[tuple[str, int, int]] = []
    for place, column in enumerate(table.columns):
        if found and column.group == found[-1][0]:
            found[-1] = (column.group, found[-1][1], place)
        else:
            found.append((column.group, place, place))
    return found


def _has_limits(value: Value) -> bool:
    return isinstance(value, Number) and not math.isnan(value.low)


def _is_numeric(table: Table, place: int) -> bool:
    return any(isinstance(row[place], Number) for row in table.rows)


def _markdown(text: str) -> str:
    return " ".join(text.split()).translate(_MARKDOWN)


def _latex(text: str) -> str:
    return " ".join(text.split()).translate(_LATEX)


def _latex_value(value: Value) -> str:
    if isinstance(value, str):
        return _latex(value)
    text = _latex(value.text)
    at = text.find(" [")
    return text if at < 0 else rf"{text[:at]}\,{{\scriptsize {text[at + 1 :]}}}"
