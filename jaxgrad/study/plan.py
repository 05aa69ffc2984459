"""What a study has to do: its cells, which of them have their data, and which are finished."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from jaxgrad.checkpoints.places import local_place
from jaxgrad.data.examples import DataSet, read_examples
from jaxgrad.errors import OutputError, UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.report.cells import Role, file_stem
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import load_run
from jaxgrad.results.urls import local_path
from jaxgrad.runs.asked import asked_identity, date_for, recorded_date
from jaxgrad.study.config import StudyConfig, StudyModel


@dataclasses.dataclass(frozen=True)
class PlannedCell:
    """One run of a study.

    Attributes:
        model, role: What it is of.
        file: Its data file, as the study names it.
        directory: Of its run.
        options: What to measure, with the date.
        data: Its examples; None where they cannot be read.
        reason: Why not; None where they can.
        finished: Whether its run is.
    """

    model: StudyModel
    role: Role
    file: str
    directory: Path
    options: AnalyzeOptions
    data: DataSet | None
    reason: str | None
    finished: bool

    @property
    def title(self) -> str:
        """For the user: "Qwen2-1.5B: AQuA, none, irrelevant"."""
        return f"{self.model.name}: {self.role.title}"


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """A study's cells, in its order, and what stands in the way of its models.

    Attributes:
        models: Name -> where the model is, or why it is missing, in words.
        missing_models: Name -> why it is missing.
    """

    config: StudyConfig
    cells: tuple[PlannedCell, ...]
    models: Mapping[str, str]
    missing_models: Mapping[str, str]

    def state(self, cell: PlannedCell) -> str:
        """How far a cell is: "finished", "without data", "without model" or "to measure"."""
        if cell.finished:
            return "finished"
        if cell.data is None:
            return "without data"
        return "without model" if cell.model.name in self.missing_models else "to measure"

    def summary(self) -> list[str]:
        """Lines that say how much there is to do, and what is missing."""
        states = Counter(map(self.state, self.cells))
        order = ("finished", "to measure", "without data", "without model")
        counts = ", ".join(f"{states[state]} {state}" for state in order if states[state])
        lines = [
            f"{self.config.title}: {_number(len(self.cells), 'cell')} "
            f"({_number(len(self.config.models), 'model')}, "
            f"{_number(len(self.config.data), 'data set')}): {counts}"
        ]
        lost = {cell.role: cell.reason for cell in self.cells if cell.data is None}
        lines += [f"  missing data: {role.title}: {reason}" for role, reason in lost.items()]
        missing = self.missing_models.items()
        return lines + [f"  missing model: {name}: {reason}" for name, reason in missing]

    def grid(self) -> list[str]:
        """A line a cell: its title, its file, whether that is there, and how far the run is."""
        lines = []
        for model in self.config.models:
            lines.append(f"{model.name} ({self.models[model.name]})")
            cells = [cell for cell in self.cells if cell.model == model]
            kinds = {data.name: data.kind for data in self.config.data}
            width = max(len(cell.role.title) for cell in cells)
            for cell in cells:
                kind = f" [{kinds[cell.role.data]}]" if kinds[cell.role.data] else ""
                here = (
                    f"missing: {cell.reason}"
                    if cell.data is None
                    else f"{len(cell.data.examples)} of {cell.data.num_records} records"
                )
                lines.append(
                    f"  {cell.role.title:{width}}{kind}  {cell.file}  {here}; {self.state(cell)}"
                )
        return lines


def plan_study(
    config: StudyConfig, output_dir: str | Path, *, report_only: bool = False
) -> StudyPlan:
    """Looks at what is there; loads no model, fetches and writes nothing.

    Args:
        config: From `read_study`.
        output_dir: Of the study; its runs are in OUTPUT_DIR/runs/MODEL/CELL.
        report_only: Nothing is to be measured, so what depends on this machine (the default of
            batch_tokens) and on the day is not compared with the runs that are there.

    Raises:
        UserError: The run of a cell has another configuration than the study, or is damaged.
    """
    directories = {
        (model, role): local_path(output_dir) / "runs" / file_stem(model.name) / role.stem
        for model in config.models
        for role in config.roles(model)
    }
    date = date_for(config.options, (_date_of(*key, path) for key, path in directories.items()))
    read: dict[str, DataSet | str] = {}
    cells = []
    for (model, role), directory in directories.items():
        file = config.roles(model)[role]
        if file not in read:
            read[file] = _read(config, file)
        found = read[file]
        options = config.options_of(model)
        # A run keeps its own day: a study may go on over midnight.
        own = date_for(options, (_date_of(model, role, directory), date))
        options = dataclasses.replace(options, date=own)
        data = None if isinstance(found, str) else found
        reason = found if isinstance(found, str) else None
        asked = asked_identity(options, config.start, config.limit)
        if data is not None:
            asked["data"]["sha256"] = data.sha256
        if report_only or data is None:
            _forget_the_machine(asked, config.options)
        with_cell = f"{model.name}: {role.title}"
        try:
            RunDirectory.check_compatible(directory, asked)
            run = load_run(directory)
        except OutputError as error:
            raise OutputError(f"{with_cell}: {error}") from error
        finished = run is not None and run["finished"]
        cells.append(PlannedCell(model, role, file, directory, options, data, reason, finished))
    models, missing = _models(config)
    return StudyPlan(config, tuple(cells), models, missing)


def _date_of(model: StudyModel, role: Role, directory: Path) -> str | None:
    try:
        return recorded_date(directory)
    except OutputError as error:
        raise OutputError(f"{model.name}: {role.title}: {error}") from error


def _forget_the_machine(asked: dict[str, Any], options: AnalyzeOptions) -> None:
    for name in ("batch_tokens", "date"):
        if getattr(options, name) is None:
            asked["options"].pop(name, None)
    if options.layerwise == "auto":
        asked["options"].pop("layerwise", None)


def _read(config: StudyConfig, file: str) -> DataSet | str:
    """The examples, or why there are none."""
    try:
        path = config.data_path(file)
        return read_examples(path, start=config.start, limit=config.limit, fields=config.fields)
    except UserError as error:
        return str(error)


def _models(config: StudyConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Where each model is, and why those are missing that surely are."""
    where, missing = {}, {}
    for model in config.models:
        try:
            path = config.model_path(model)
            place = local_place(path)
        except UserError as error:
            missing[model.name] = in_a_study(error)
            where[model.name] = f"missing: {missing[model.name]}"
            continue
        if place is not None:
            where[model.name] = f"{place.path.name}, here"
        elif isinstance(try_to_load_from_cache(str(path), "config.json"), str):
            where[model.name] = f"{path}, in the hub's cache"
        else:
            where[model.name] = f"{path}, to be fetched from the hub"
    return where, missing


def in_a_study(error: UserError) -> str:
    """A model's error as a reason; a study has no --model_path."""
    return str(error).removeprefix("--model_path ")


def unavailable(config: StudyConfig, reasons: Mapping[tuple[str, Role], str]) -> dict[str, str]:
    """What is missing -> why, with what fails for the same reason as one entry.

    Args:
        config: The study.
        reasons: (model, role) -> why that cell is not there.
    """
    models = [model.name for model in config.models]
    roles = list(config.roles(config.models[0]))
    # The model is part of a role.
    roles = [dataclasses.replace(role, model="") for role in roles]
    left = {
        (name, dataclasses.replace(role, model="")): why for (name, role), why in reasons.items()
    }
    told: dict[str, str] = {}
    for name in models:
        if why := _common(left.get((name, role)) for role in roles):
            told[f"{name}, all {len(roles)} cells"] = why
            left = {key: value for key, value in left.items() if key[0] != name}
            models = [other for other in models if other != name]
    for role in roles:
        if len(models) > 1 and (why := _common(left.get((name, role)) for name in models)):
            told[f"{role.title}, all models"] = why
            left = {key: value for key, value in left.items() if key[1] != role}
    single = len(config.models) == 1
    for (name, role), why in left.items():
        told[role.title if single else f"{name}: {role.title}"] = why
    return told


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _common(reasons: Iterable[str | None]) -> str | None:
    """The reason that all have, if they have one."""
    found = set(reasons)
    return found.pop() if len(found) == 1 else None
