"""What is asked of a run, and what stands in its directory already.

All of it is known before a model is opened.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxgrad.checkpoints import Checkpoint
from jaxgrad.data.files import run_name
from jaxgrad.data.read import DataSet
from jaxgrad.data.tokens import read_date
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import is_whole, load_run
from jaxgrad.results.urls import path_below
from jaxgrad.runs import plan


@dataclasses.dataclass(frozen=True)
class AskedRun:
    """A slice of a data file that is to be measured into a directory.

    Attributes:
        data: the examples.
        output_dir: a path or a URL.
        options: with the date, and with what the run that stands there has chosen by its memory.
        identity: what the numbers depend on, as far as the command tells it.
    """

    data: DataSet
    output_dir: str | Path
    options: AnalyzeOptions
    identity: dict[str, Any]

    def for_model(self, checkpoint: Checkpoint) -> "AskedRun":
        """The same with a `max_length` that the model decides.

        Raises:
            OutputError: the directory holds a run with another one.
            UserError: the one that was given exceeds the model's positions.
        """
        options = self.options.fitted_to(checkpoint.config.max_positions)
        asked = self.identity["options"] | {"max_length": options.max_length}
        identity = self.identity | {"options": asked}
        RunDirectory.check_compatible(self.output_dir, identity)
        return dataclasses.replace(self, options=options, identity=identity)


def run_directories(
    data_paths: Sequence[str | Path], output_dir: str | Path
) -> dict[str | Path, str | Path]:
    """Data file -> directory of its run: the output directory itself, or one in it for each of several.

    Raises:
        UserError: two files have the same name, or one that names no directory.
    """
    if len(data_paths) == 1:
        return {data_paths[0]: output_dir}
    directories: dict[str | Path, str | Path] = {
        path: path_below(output_dir, run_name(path)) for path in data_paths
    }
    if len(set(directories.values())) < len(data_paths):
        raise UserError(
            "--data_path: two files have the same name, and each run's directory is named after its file"
        )
    return directories


def ask_run(
    data: DataSet, output_dir: str | Path, options: AnalyzeOptions, *, start: int, limit: int | None
) -> AskedRun:
    """A run whose directory can be written, or holds this very run.

    Args:
        data: from `read_examples` with the same `start` and `limit`.
        output_dir: a path or a URL; made when the run begins.
        options: with their date, see `date_for`.
        start: index of the first example.
        limit: how many examples at most.

    Raises:
        OutputError: the directory cannot be written or holds another run.
    """
    options = with_recorded_choices(options, output_dir)
    identity = asked_identity(options, start, limit, data)
    RunDirectory.check_compatible(output_dir, identity)
    RunDirectory.probe(output_dir)
    return AskedRun(data, output_dir, options, identity)


def asked_identity(
    options: AnalyzeOptions, start: int, limit: int | None, data: DataSet | None = None
) -> dict[str, Any]:
    """What of a run's identity follows from its flags and its data, None where these are not there.

    Excludes options chosen from free memory, of which a run that is there keeps its own, and a
    `max_length` that the model decides.
    """
    asked = options.identity()
    if options.batch_tokens is None:
        del asked["batch_tokens"]
    if options.layerwise == "auto":
        del asked["layerwise"]
    if options.max_length is None:
        del asked["max_length"]
    records: dict[str, Any] = {"start": start, "limit": limit}
    if data is not None:
        records |= {"sha256": data.sha256, **data.choice}
    return {"data": records, "options": asked, "window": plan.WINDOW}


def finished_before(output_dir: str | Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The counts of the finished run in `output_dir`, if it is whole and made from these model files.

    The options were compared before. Files of the same names, sizes and times count as the same: to be
    sure, the whole model would have to be read only to say that there is nothing to do.
    """
    run = load_run(output_dir)
    if run is None or not run["finished"]:
        return None
    files = {name: list(stat) for name, stat in checkpoint.files.items()}
    same = run["sessions"][-1]["info"].get("model_files") == files
    return run["counts"] if same and is_whole(output_dir) else None


def recorded_date(output_dir: str | Path) -> str | None:
    """The date of the run that stands in a directory; None where there is no run.

    Raises:
        OutputError: its run.json is damaged.
    """
    return _recorded_options(output_dir).get("date")


def with_recorded_choices(options: AnalyzeOptions, output_dir: str | Path) -> AnalyzeOptions:
    """The options with what was chosen by memory for the run that stands in a directory, if any.

    A run is continued as it was begun, also where other memory is free.

    Raises:
        OutputError: its run.json is damaged.
    """
    recorded = _recorded_options(output_dir)
    if options.batch_tokens is None:
        options = dataclasses.replace(options, batch_tokens=recorded.get("batch_tokens"))
    if options.layerwise == "auto" and recorded.get("layerwise") in ("yes", "no"):
        options = dataclasses.replace(options, layerwise=recorded["layerwise"])
    return options


def _recorded_options(output_dir: str | Path) -> dict[str, Any]:
    run = load_run(output_dir)
    return run["identity"].get("options", {}) if run else {}


def date_for(options: AnalyzeOptions, recorded: Iterable[str | None]) -> str:
    """The day that chat templates print: as asked, as in the first run that is there, or today."""
    if options.date is not None:
        return read_date(options.date).isoformat()
    return next(filter(None, recorded), None) or datetime.date.today().isoformat()
