"""What a study has to do: its cells, which of them have their data, and which are finished."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import try_to_load_from_cache

from jaxgrad.checkpoints.places import find_local_model
from jaxgrad.data.read import DataSet, read_examples
from jaxgrad.errors import OutputError, UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.report.cells import Role, file_stem
from jaxgrad.results import RunDirectory
from jaxgrad.results.layout import load_run
from jaxgrad.results.urls import local_path
from jaxgrad.runs.asked import asked_identity, date_for, recorded_date
from jaxgrad.study.config import DataFile, StudyConfig, StudyModel

# How far a cell is, in the order of the summary.
State = Literal["finished", "to measure", "without data", "without model"]


@dataclasses.dataclass(frozen=True)
class PlannedCell:
    """One run of a study.

    Attributes:
        model: The model that is measured.
        role: The part that the run plays in the study.
        file: Its data file, as the study names it.
        directory: Of its run.
        options: What to measure, with the date.
        data: Its examples; None if they cannot be read.
        reason: Why they cannot be read; None if they can.
        finished: Whether its run is finished.
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
        """For messages: "Qwen2-1.5B: AQuA, none, irrelevant"."""
        return f"{self.model.name}: {self.role.title}"


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """A study's cells and models, and what is missing of them.

    Attributes:
        config: The study.
        cells: In the order of the study.
        models: Name of a model -> where it is, or why it is missing, in words.
        missing_models: Name of a missing model -> why it is missing.
    """

    config: StudyConfig
    cells: tuple[PlannedCell, ...]
    models: Mapping[str, str]
    missing_models: Mapping[str, str]

    def state(self, cell: PlannedCell) -> State:
        """How far a cell is."""
        if cell.finished:
            return "finished"
        if cell.data is None:
            return "without data"
        return "without model" if cell.model.name in self.missing_models else "to measure"

    def summary(self) -> list[str]:
        """Lines that say how much is to be done, and what is missing."""
        states = Counter(map(self.state, self.cells))
        counts = ", ".join(f"{states[state]} {state}" for state in get_args(State) if states[state])
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
        """A line for each cell: its title, its data file, how many records of it, how far the run is."""
        lines = []
        for model in self.config.models:
            lines.append(f"{model.name} ({self.models[model.name]})")
            cells = [cell for cell in self.cells if cell.model == model]
            kinds = {data.name: data.kind for data in self.config.data}
            width = max(len(cell.role.title) for cell in cells)
            for cell in cells:
                kind = f" [{kinds[cell.role.data]}]" if kinds[cell.role.data] else ""
                records = (
                    f"missing: {cell.reason}"
                    if cell.data is None
                    else f"{len(cell.data.examples)} of {cell.data.num_records} records"
                )
                lines.append(
                    f"  {cell.role.title:{width}}{kind}  {cell.file}  {records}; {self.state(cell)}"
                )
        return lines


def plan_study(config: StudyConfig, output_dir: str | Path) -> StudyPlan:
    """Finds what is there and what is to be done. Loads no model, fetches and writes nothing.

    Args:
        config: From `read_study`.
        output_dir: Of the study. Its runs are in OUTPUT_DIR/runs/MODEL/CELL.

    Raises:
        UserError: The run of a cell has other settings than the study, or is damaged.
    """
    directories = {
        (model, role): local_path(output_dir) / "runs" / file_stem(model.name) / role.stem
        for model in config.models
        for role in config.roles(model)
    }
    date = date_for(config.options, (_date_of(*key, path) for key, path in directories.items()))
    read: dict[DataFile, DataSet | str] = {}
    cells = []
    for (model, role), directory in directories.items():
        file = config.roles(model)[role]
        if file not in read:
            read[file] = _read(config, file)
        found = read[file]
        options = config.options_of(model)
        # A run keeps its own date: a study may go on after midnight.
        run_date = date_for(options, (_date_of(model, role, directory), date))
        options = dataclasses.replace(options, date=run_date)
        data = None if isinstance(found, str) else found
        reason = found if isinstance(found, str) else None
        asked = asked_identity(options, config.start, config.limit, data)
        try:
            RunDirectory.check_compatible(directory, asked)
            run = load_run(directory)
        except OutputError as error:
            raise OutputError(f"{model.name}: {role.title}: {error}") from error
        finished = run is not None and run["finished"]
        cells.append(
            PlannedCell(model, role, str(file), directory, options, data, reason, finished)
        )
    models, missing = _models(config)
    return StudyPlan(config, tuple(cells), models, missing)


def _date_of(model: StudyModel, role: Role, directory: Path) -> str | None:
    try:
        return recorded_date(directory)
    except OutputError as error:
        raise OutputError(f"{model.name}: {role.title}: {error}") from error


def _read(config: StudyConfig, file: DataFile) -> DataSet | str:
    """A file's examples, or why they cannot be read."""
    try:
        return read_examples(
            config.data_path(file.path),
            start=config.start,
            limit=config.limit,
            fields=config.fields,
            data_format=file.data_format,
            response=file.response,
        )
    except UserError as error:
        return str(error)


def _models(config: StudyConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Where each model is, and why models are missing. A hub id counts as found."""
    where, missing = {}, {}
    for model in config.models:
        try:
            path, options = config.model_path(model), config.model_options(model)
            found = find_local_model(path)
            if options.base_model_path is not None:
                find_local_model(options.base_model_path, flag="base_model_path")
        except UserError as error:
            missing[model.name] = in_a_study(error)
            where[model.name] = f"missing: {missing[model.name]}"
            continue
        if found is not None:
            where[model.name] = f"{found.path.name}, here"
        elif _is_cached(str(path), options.revision):
            where[model.name] = f"{path}, in the hub's cache"
        else:
            where[model.name] = f"{path}, to be fetched from the hub"
    return where, missing


def _is_cached(hub_id: str, revision: str | None) -> bool:
    """Whether a model's or an adapter's config is in the hub's cache."""
    names = ("config.json", "adapter_config.json")
    return any(isinstance(try_to_load_from_cache(hub_id, n, revision=revision), str) for n in names)


def in_a_study(error: UserError) -> str:
    """A model's error as a reason, without the flag --model_path, which a study does not have."""
    return str(error).removeprefix("--model_path ")


def unavailable(config: StudyConfig, reasons: Mapping[tuple[str, Role], str]) -> dict[str, str]:
    """What is missing -> why. Cells that lack the same thing become one entry.

    Args:
        config: The study.
        reasons: (model, role) -> why that cell is missing.
    """
    models = [model.name for model in config.models]
    # A role names its model. Without it the roles of all models are the same.
    roles = [dataclasses.replace(role, model="") for role in config.roles(config.models[0])]
    left = {
        (model, dataclasses.replace(role, model="")): why for (model, role), why in reasons.items()
    }
    entries: dict[str, str] = {}
    for model in models:
        if why := _common(left.get((model, role)) for role in roles):
            entries[f"{model}, all {len(roles)} cells"] = why
            left = {key: value for key, value in left.items() if key[0] != model}
            models = [other for other in models if other != model]
    for role in roles:
        if len(models) > 1 and (why := _common(left.get((model, role)) for model in models)):
            entries[f"{role.title}, all models"] = why
            left = {key: value for key, value in left.items() if key[1] != role}
    single = len(config.models) == 1
    for (model, role), why in left.items():
        entries[role.title if single else f"{model}: {role.title}"] = why
    return entries


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _common(reasons: Iterable[str | None]) -> str | None:
    """The reason that all share; None if they differ."""
    found = set(reasons)
    return found.pop() if len(found) == 1 else None
