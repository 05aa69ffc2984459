"""The file that declares a study: TOML -> `StudyConfig`. Unknown keys and values are refused.

| table | keys |
|---|---|
| (top) | title; about, data_root: relative to the file |
| [analyze] | flags of `bin/analyze` by name, on examples, tokens and what is measured |
| [report] | level, num_resamples, num_permutations, seed |
| [[models]] | name; path (left out: the embedded model), base_model_path, adapter, revision, role, pair |
| [[data]] | name, correct = {setting = file}; kind, data_format, irrelevant = {setting = file} |

A file is a path, hf:ORG/NAME:SPLIT, or {file = ..., response = "chosen" or "rejected"}.

`${NAME}` in a path is an environment variable. A variable that is not set is no error here: the study's
other files and models can still be measured.
"""

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from jaxgrad.analysis import Resampling
from jaxgrad.data.examples import Fields
from jaxgrad.data.hub import HUB_MARK
from jaxgrad.data.read import AUTO, FORMAT_NAMES
from jaxgrad.data.record import ResponseName
from jaxgrad.data.tokens import read_date
from jaxgrad.errors import UserError
from jaxgrad.gradients.loss import LOSSES
from jaxgrad.options import AnalyzeOptions, Choice, ModelOptions
from jaxgrad.paths import expanded
from jaxgrad.report.cells import CORRECT, IRRELEVANT, RESPONSES, Role, file_stem

_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_SLICE = {"start": int, "limit": int}
_FIELDS = {f"{field.name}_field": str for field in dataclasses.fields(Fields)}
_FORMAT = Literal[FORMAT_NAMES]  # type: ignore[valid-type]
_LEAST = {"start": 0, "limit": 1, "max_length": 1, "batch_tokens": 1, "seed": 0}
ModelRole = Literal["base", "instruct"]
BASE, INSTRUCT = MODEL_ROLES = typing.get_args(ModelRole)


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """A model of a study.

    Attributes:
        name: For headings and directories.
        path: As `bin/analyze --model_path` takes it; None for the embedded model.
        role: "base" or "instruct". Prompts of a base model are plain text unless [analyze] sets `chat`:
            many base models carry a chat template that they were not trained on.
        pair: A base and an instruction-tuned model of the same pair are compared.
        base_model_path: Of an adapter, as `bin/analyze --base_model_path` takes it.
        adapter: Whether the directory's adapter is used.
        revision: Of a hub id.
    """

    name: str
    path: str | None = None
    role: ModelRole | None = None
    pair: str | None = None
    base_model_path: str | None = None
    adapter: Choice = "auto"
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class DataFile:
    """The records of a cell.

    Attributes:
        path: As the study names it.
        data_format: Of --data_format.
        response: Of --response; None if its records have one.
    """

    path: str
    data_format: str = AUTO
    response: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.response})" if self.response else self.path


@dataclasses.dataclass(frozen=True)
class StudyData:
    """A data set of a study.

    Attributes:
        name: For headings and directories.
        kind: What it is about, in one word: "reasoning", "knowledge", "quality".
        files: Response ("correct", "irrelevant") -> setting ("none", "detailed") -> file.
    """

    name: str
    kind: str
    files: Mapping[str, Mapping[str, DataFile]]


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A study as its file declares it.

    Attributes:
        path: The file.
        title: Of the report.
        about: The text at its top.
        data_root: The directory of data files that are given by relative paths, as written in the file.
        options: What to measure.
        start: The first example of every data file.
        limit: How many examples of every data file; None for all.
        fields: The names of a record's fields.
        resampling: How the report makes its intervals and tests.
        models: One side of the grid.
        data: The other side.
    """

    path: Path
    title: str
    about: str
    data_root: str
    options: AnalyzeOptions
    start: int
    limit: int | None
    fields: Fields
    resampling: Resampling
    models: tuple[StudyModel, ...]
    data: tuple[StudyData, ...]

    def roles(self, model: StudyModel) -> dict[Role, DataFile]:
        """The cells of one model -> their data files, in the order of the study."""
        return {
            Role(model.name, data.name, setting, response): file
            for data in self.data
            for response, files in data.files.items()
            for setting, file in files.items()
        }

    def options_of(self, model: StudyModel) -> AnalyzeOptions:
        """What to measure of a model. A base model gets no chat template, see `StudyModel.role`."""
        if model.role == BASE and self.options.chat == "auto":
            return dataclasses.replace(self.options, chat="no")
        return self.options

    def model_pairs(self) -> list[tuple[str, str]]:
        """The models to compare, as names (base, instruction-tuned)."""
        return [
            (base.name, tuned.name)
            for base in self.models
            for tuned in self.models
            if base.pair is not None and base.pair == tuned.pair
            if (base.role, tuned.role) == (BASE, INSTRUCT)
        ]

    def data_path(self, file: str) -> Path | str:
        """The path of a data set's file; the name of a hub set as it is.

        Raises:
            UserError: An environment variable in it is not set.
        """
        if file.startswith(HUB_MARK):
            return file
        path = Path(expanded(file))
        if path.is_absolute():
            return path
        return self.path.parent / expanded(self.data_root) / path

    def model_path(self, model: StudyModel) -> str | None:
        """A model's path for `open_checkpoint`: relative to the study's file if it exists there.

        Raises:
            UserError: An environment variable in it is not set.
        """
        return self._beside(model.path)

    def model_options(self, model: StudyModel) -> ModelOptions:
        """What besides its path decides which weights a model has.

        Raises:
            UserError: An environment variable in the base's path is not set.
        """
        return ModelOptions(self._beside(model.base_model_path), model.adapter, model.revision)

    def _beside(self, path: str | None) -> str | None:
        if path is None:
            return None
        path = expanded(path)
        beside = self.path.parent / path
        return str(beside) if path.startswith(("./", "../")) or beside.exists() else path


def read_study(path: str | os.PathLike[str], *, limit: int | None = None) -> StudyConfig:
    """Reads a study's file.

    Args:
        path: The file.
        limit: How many examples of each data file, instead of the file's own `limit`.

    Raises:
        UserError: The file is missing or not TOML, a key is unknown, missing or of a wrong type, or two
            cells would have the same directory.
    """
    path = Path(expanded(os.fspath(path)))
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --config takes a study's TOML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UTF-8, integers of 5000 digits
        raise UserError(f"{path}: is not TOML: {error}; mend that line") from error
    top = _Table(path, "", tree)
    top.only({"title", "about", "data_root", "analyze", "report", "models", "data"})
    models = tuple(_model(table) for table in top.tables("models"))
    data = tuple(_data(table) for table in top.tables("data"))
    analyze = top.table("analyze")
    kinds = typing.get_type_hints(AnalyzeOptions)
    analyze.only([*kinds, *_SLICE, *_FIELDS])
    report = top.table("report")
    limits = typing.get_type_hints(Resampling)
    report.only(limits)
    config = StudyConfig(
        path=path,
        title=top.value("title", str),
        about=top.value("about", str, ""),
        data_root=top.value("data_root", str, "."),
        options=AnalyzeOptions(**analyze.values(kinds)),
        start=analyze.value("start", int, 0),
        limit=limit or analyze.value("limit", int, None),
        fields=Fields(
            **{name.removesuffix("_field"): v for name, v in analyze.values(_FIELDS).items()}
        ),
        resampling=_resampling(report, limits),
        models=models,
        data=data,
    )
    _check(config, analyze)
    return config


def _resampling(report: "_Table", kinds: Mapping[str, Any]) -> Resampling:
    try:
        return Resampling(**report.values(kinds))
    except UserError as error:
        report.refuse(str(error))


def _check(config: StudyConfig, analyze: "_Table") -> None:
    """Refuses what cannot be seen from one key and its type."""
    if config.options.date is not None:
        try:
            read_date(config.options.date)
        except UserError as error:
            analyze.refuse(str(error))
    if config.options.loss not in LOSSES:
        analyze.refuse(f"loss = {config.options.loss!r} is unknown: use one of {', '.join(LOSSES)}")
    top = _Table(config.path, "", {})
    stems: dict[str, str] = {}
    for model in config.models:
        stem = file_stem(model.name)
        if stem in stems:
            top.refuse(
                f"the models {stems[stem]!r} and {model.name!r} would have the same directory "
                f"{stem!r}: give one another name"
            )
        stems[stem] = model.name
        if model.pair is not None and not any(model.name in pair for pair in config.model_pairs()):
            top.refuse(
                f"the model {model.name!r} is alone in the pair {model.pair!r}: give a model of the "
                f"other role ({', '.join(MODEL_ROLES)}) the same pair, or leave pair out"
            )
    names = [data.name for data in config.data]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        top.refuse(f"two data sets are called {twice!r}: give each its own name")
    roles: dict[str, Role] = {}
    for role in config.roles(config.models[0]):
        other = roles.setdefault(role.stem, role)
        if other != role:
            top.refuse(
                f"the cells {other.title!r} and {role.title!r} would have the same directory "
                f"{role.stem!r}: give one another name"
            )


def _model(table: "_Table") -> StudyModel:
    table.only([field.name for field in dataclasses.fields(StudyModel)])
    role = table.value("role", ModelRole, None)
    pair = table.value("pair", str, None)
    if pair is not None and role is None:
        table.refuse(f'pair needs a role: add role = "{BASE}" or role = "{INSTRUCT}"')
    name = table.value("name", str)
    table.stem(name)
    return StudyModel(
        name,
        table.value("path", str, None),
        role,
        pair,
        table.value("base_model_path", str, None),
        table.value("adapter", Choice, "auto"),
        table.value("revision", str, None),
    )


def _data(table: "_Table") -> StudyData:
    table.only({"name", "kind", "data_format", *RESPONSES})
    name = table.value("name", str)
    table.stem(name)
    files = {}
    for response in RESPONSES:
        if response == IRRELEVANT and response not in table.content:
            continue
        inner = table.table(response)
        if not inner.content:
            table.refuse(f"{response} names no file: give {response} = {{SETTING = FILE}}")
        for setting in inner.content:
            inner.stem(setting)
        data_format = table.value("data_format", _FORMAT, AUTO)
        files[response] = {s: _file(inner, s, data_format) for s in inner.content}
    assert CORRECT in files
    return StudyData(name, table.value("kind", str, ""), files)


def _file(table: "_Table", setting: str, data_format: str) -> DataFile:
    if not isinstance(table.content[setting], dict):
        return DataFile(table.value(setting, str), data_format)
    inner = table.table(setting)
    inner.only({"file", "response"})
    response = inner.value("response", ResponseName, None)
    return DataFile(inner.value("file", str), data_format, response)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table of the file, with its name for errors. Its methods raise `UserError`."""

    path: Path
    name: str
    content: dict[str, Any]

    def refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path}: {f'[{self.name}]: ' * bool(self.name)}{what}")

    def only(self, known: Collection[str]) -> None:
        for key in self.content:
            if key not in known:
                self.refuse(f"{key!r} is not a key here: remove it, or use {', '.join(known)}")

    def stem(self, name: str) -> None:
        try:
            file_stem(name)
        except UserError as error:
            self.refuse(str(error))

    def value(self, key: str, kind: Any, *default: Any) -> Any:
        """A key's value. Without a default the key must be there."""
        if key not in self.content:
            if default:
                return default[0]
            self.refuse(f"{key!r} is missing: add {key} = ...")
        value = self.content[key]
        choices: tuple[str, ...] = ()
        if typing.get_origin(kind) is Literal:
            choices, kind = typing.get_args(kind), str
        if isinstance(kind, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.refuse(f"{key} = {value!r} is not {_TYPES[kind]}: write {_TYPES[kind]}")
        if choices and value not in choices:
            self.refuse(f"{key} = {value!r} is unknown: use one of {', '.join(choices)}")
        if kind is str and not value.strip() and not (default and default[0] == ""):
            self.refuse(f"{key} is empty: give it a value")
        if key in _LEAST and value < _LEAST[key]:
            self.refuse(f"{key} = {value} is too small: give {_LEAST[key]} or more")
        return value

    def values(self, kinds: Mapping[str, Any]) -> dict[str, Any]:
        """The values of those keys that are there."""
        return {key: self.value(key, kind) for key, kind in kinds.items() if key in self.content}

    def table(self, key: str) -> "_Table":
        """A table inside this one; empty if it is not there."""
        content = self.content.get(key, {})
        if not isinstance(content, dict):
            self.refuse(f"{key!r} is not a table: write it as [{key}] with its keys below")
        return _Table(self.path, f"{self.name}.{key}".lstrip("."), content)

    def tables(self, key: str) -> list["_Table"]:
        """The tables of a list, at least one."""
        content = self.content.get(key)
        if not content:
            self.refuse(f"there is no [[{key}]]: add one or more")
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            self.refuse(f"{key!r} is not a list of tables: write each as [[{key}]]")
        return [_Table(self.path, f"{key}, number {k}", part) for k, part in enumerate(content, 1)]
