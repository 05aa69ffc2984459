"""A job: a slice of a data file, the directory that it is measured into, and what stands there already."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgrad import windows
from jaxgrad.errors import UserError
from jaxgrad.examples import DataSet
from jaxgrad.models import Checkpoint
from jaxgrad.options import AnalyzeOptions
from jaxgrad.planning import with_recorded_choices
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import is_whole, load_run
from jaxgrad.results.urls import place_below


@dataclasses.dataclass(frozen=True)
class Job:
    """A slice of a data file that is to be measured into a directory.

    Attributes:
        output_dir: a path or a URL.
        options: the session's; the date may be the directory's own.
        identity: what the numbers depend on and is known before a model is opened.
    """

    data: DataSet
    output_dir: str | Path
    options: AnalyzeOptions
    identity: dict[str, Any]


def run_places(
    data_paths: Sequence[str | Path], output_dir: str | Path
) -> dict[str | Path, str | Path]:
    """Data file -> directory of its run: the output directory itself, or one in it for each of several.

    Raises:
        UserError: two files have the same name, or one that names no directory.
    """
    if len(data_paths) == 1:
        return {data_paths[0]: output_dir}
    places: dict[str | Path, str | Path] = {
        path: place_below(output_dir, Path(path).stem) for path in data_paths
    }
    if len(set(places.values())) < len(data_paths):
        raise UserError(
            "--data_path: two files have the same name, and each run's directory is named after its file"
        )
    return places


def plan_job(
    data: DataSet, output_dir: str | Path, options: AnalyzeOptions, *, start: int, limit: int | None
) -> Job:
    """A job whose directory is there to be written, or holds this very run.

    Args:
        data: from `read_examples` with the same `start` and `limit`.
        output_dir: a path or a URL; made when the job is run.
        options: with their date, see `date_for`.
        start: index of the first example.
        limit: how many examples at most.

    Raises:
        OutputError: the directory cannot be written or holds another run.
    """
    options = with_recorded_choices(options, output_dir)
    identity = asked_identity(options, start, limit)
    identity["data"]["sha256"] = data.sha256
    RunDirectory.check_compatible(output_dir, identity)
    RunDirectory.probe(output_dir)
    return Job(data, output_dir, options, identity)


def asked_identity(options: AnalyzeOptions, start: int, limit: int | None) -> dict[str, Any]:
    """What of a run's identity follows from its flags alone.

    What is not given but chosen by the memory at hand is not in it: a run that is there keeps its own.
    """
    asked = dataclasses.asdict(options)
    if options.batch_tokens is None:
        del asked["batch_tokens"]
    if options.layerwise == "auto":
        del asked["layerwise"]
    return {"data": {"start": start, "limit": limit}, "options": asked, "window": windows.WINDOW}


def finished_before(output_dir: str | Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The counts of the finished run in `output_dir`, if it is whole and made from these very model files.

    The options were compared before. Files of the same names, sizes and times are taken for the same:
    the alternative is to read the whole model only to say that there is nothing to do.
    """
    run = load_run(output_dir)
    if run is None or not run["finished"]:
        return None
    files = {name: list(stat) for name, stat in checkpoint.files.items()}
    same = run["sessions"][-1]["info"].get("model_files") == files
    return run["counts"] if same and is_whole(output_dir) else None
