"""Writes a report into a directory: cells -> comparisons -> tables, findings, figures and the page."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxgrad.analysis import Resampling, check_comparable
from jaxgrad.errors import UserError
from jaxgrad.report.all_tables import all_tables
from jaxgrad.report.cells import Cell, check_distinct
from jaxgrad.report.comparisons import Report, compare_all, wanted_pairs, wanted_statistics
from jaxgrad.report.figures import YLimits, write_figures
from jaxgrad.report.findings import Finding, findings
from jaxgrad.report.page import write_page
from jaxgrad.report.tables import Table, as_csv, as_latex, as_markdown
from jaxgrad.results.urls import local_path

PAGE, SUMMARY, MANIFEST = "index.html", "report.md", "report.json"


def write_report(
    cells: Sequence[Cell],
    output_dir: str | Path,
    *,
    title: str,
    about: str = "",
    model_pairs: Sequence[tuple[str, str]] = (),
    unavailable: Mapping[str, str] | None = None,
    statistics: Sequence[str] = (),
    resampling: Resampling = Resampling(),
    y_limits: YLimits = "shared",
    progress: bool = False,
) -> Path:
    """Writes a report's page, tables and figures.

    | file | what is in it |
    |---|---|
    | index.html | everything, interactive, without the network |
    | report.md | findings and tables as Markdown |
    | tables/NAME.md, .csv, .tex | each table |
    | figures/NAME.svg, .png | each figure |
    | report.json | the list of these files |

    It is made in a directory beside `output_dir` and moved there when it is whole. Files of an earlier
    report are replaced.

    Args:
        cells: Runs with distinct roles.
        output_dir: Made where it is missing.
        title: Heading.
        about: What was asked.
        model_pairs: (base, instruction-tuned) names of models.
        unavailable: What was asked for and is not among the cells -> why.
        statistics: Names of statistics besides the default ones, or of columns of the runs' files.
        resampling: See there.
        y_limits: See `write_figures`.
        progress: Show bars on stderr.

    Returns:
        The path of index.html.

    Raises:
        UserError: No cell, two cells of one role, runs that cannot be compared or are of different
            losses, no such statistic, or a directory that holds something else.
    """
    output_dir = local_path(output_dir)
    if not cells:
        raise UserError("There is no run to report on. Give at least one.")
    check_distinct([cell.role for cell in cells])
    wanted_statistics(cells, statistics)
    for kind, first, second in wanted_pairs(cells, model_pairs):
        check_comparable(first.examples, second.examples, same_model=kind != "model")
    earlier = _earlier_files(output_dir)
    report = compare_all(
        cells,
        title=title,
        about=about,
        model_pairs=model_pairs,
        unavailable=unavailable,
        statistics=statistics,
        resampling=resampling,
        progress=progress,
    )
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".report-") as made:
            _write_files(report, Path(made), y_limits, progress)
            _move(Path(made), output_dir, earlier)
    except OSError as error:
        raise UserError(f"Cannot write the report to {output_dir}: {error.strerror}.") from error
    return output_dir / PAGE


def read_y_limits(text: str) -> YLimits:
    """Reads "shared", "free" or "LOW,HIGH" as what `write_figures` takes.

    Raises:
        UserError: None of them.
    """
    if text in ("shared", "free"):
        return text  # type: ignore[return-value]
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--y_limits: {text!r} is none of shared, free and LOW,HIGH")
    return low, high


def _write_files(report: Report, directory: Path, y_limits: YLimits, progress: bool) -> None:
    tables, found = all_tables(report), findings(report)
    (directory / "tables").mkdir()
    for table in tables:
        for suffix, form in ((".md", as_markdown), (".csv", as_csv), (".tex", as_latex)):
            (directory / "tables" / f"{table.name}{suffix}").write_text(form(table), "utf-8")
    (directory / SUMMARY).write_text(_summary(report, found, tables), "utf-8")
    write_figures(report, directory / "figures", y_limits=y_limits, progress=progress)
    write_page(report, tables, found, directory / PAGE)


def _summary(report: Report, found: Sequence[Finding], tables: Sequence[Table]) -> str:
    lines = [f"# {report.title}", "", report.about, ""]
    for finding in found:
        outcome = "" if finding.outcome == "info" else f" ({finding.outcome})"
        lines += [f"## {finding.heading}{outcome}", "", finding.lead, ""]
        lines += [f"- {sentence}" for sentence in finding.sentences]
        lines.append("")
    return "\n".join([*lines, "## Tables", "", *(as_markdown(table) for table in tables)])


def _earlier_files(output_dir: Path) -> list[str]:
    """The files of an earlier report there.

    Raises:
        UserError: The directory holds something else.
    """
    if not output_dir.exists():
        return []
    if not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file. Give a directory for the report.")
    try:
        names = json.loads((output_dir / MANIFEST).read_text("utf-8"))["files"]
        inside = [name for name in names if (output_dir / name).resolve().is_relative_to(
            output_dir.resolve()
        )]  # fmt: skip
    except FileNotFoundError:
        if any(output_dir.iterdir()):
            raise UserError(
                f"{output_dir} holds files that are no report of ours. Give another --output_dir."
            ) from None
        return []
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{output_dir / MANIFEST} cannot be read, so what is an earlier report's there is not "
            "known. Give another --output_dir, or remove that directory."
        ) from None
    return inside


def _move(made: Path, output_dir: Path, earlier: Sequence[str]) -> None:
    files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    output_dir.mkdir(exist_ok=True)
    # Written before anything is moved, so that a report that is interrupted here can be replaced.
    manifest = {"files": sorted({*earlier, *files})}
    (output_dir / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    # The page last: when it is there, so are the other files.
    for name in sorted(files, key=lambda name: name == PAGE):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, output_dir / name)
    for name in set(earlier) - set(files) - {MANIFEST}:
        (output_dir / name).unlink(missing_ok=True)
    (output_dir / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", "utf-8")
