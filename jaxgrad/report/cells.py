"""The runs that a report is made of, each with its role: model, data set, setting, response."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgrad.analysis import ExampleSet, example_set
from jaxgrad.analysis.similarity import Similarity, mean_similarity
from jaxgrad.errors import UserError
from jaxgrad.results import Results, read_authors_jsonl, read_results
from jaxgrad.results.urls import is_url, local_path

UNKNOWN_MODEL = "unknown model"
CORRECT, IRRELEVANT = RESPONSES = ("correct", "irrelevant")


@dataclass(frozen=True)
class Role:
    """The role of a run in a report.

    Attributes:
        model: The model's name.
        data: The data set's name ("AQuA"); may be empty where there is only one.
        setting: What is varied within the data set: "none", "simplified", "detailed"; "popular".
        response: "correct", or "irrelevant": answers shuffled over the instructions.
    """

    model: str
    data: str
    setting: str
    response: str = CORRECT

    @property
    def title(self) -> str:
        """For headings and legends: "AQuA, none, irrelevant"."""
        return ", ".join(part for part in (self.data, self.within) if part)

    @property
    def within(self) -> str:
        """The same without the data set: "none, irrelevant"."""
        return self.setting if self.response == CORRECT else f"{self.setting}, {self.response}"

    @property
    def stem(self) -> str:
        """For names of files and directories, without the model: "aqua.none.irrelevant"."""
        return ".".join(
            file_stem(part) for part in (self.data, self.setting, self.response) if part
        )


@dataclass(frozen=True)
class Cell:
    """A run that a report is made of.

    Attributes:
        role: See there.
        path: Where it was read from, a path or a URL.
        examples: Its usable examples.
        similarity: Its mean cosines; None where they were not measured.
    """

    role: Role
    path: str | Path
    examples: ExampleSet
    similarity: Similarity | None


def file_stem(name: str) -> str:
    """A name for use in a file's name: letters, digits, '-' and '_'; the rest becomes '-'.

    Raises:
        UserError: Nothing is left of it.
    """
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.lower())
    if not stem.strip("-"):
        raise UserError(
            f"The name {name!r} has no letter or digit, so no file can be named after it."
        )
    return stem.strip("-")


def parse_label(label: str) -> tuple[str | None, Role]:
    """Reads a label of `bin/report --runs`.

    | label | data set, setting, response |
    |---|---|
    | none | "", none, correct |
    | AQuA/none | AQuA, none, correct |
    | AQuA/none/irrelevant | as it says |
    | MODEL/AQuA/none/irrelevant | as it says, of a model named so |

    Returns:
        The model's name, None where the label has none; and the role, its model empty.

    Raises:
        UserError: An empty part, more than four of them, or another response.
    """
    parts = [part.strip() for part in label.split("/")]
    if not all(parts) or len(parts) > 4:
        raise UserError(
            f"The label {label!r} is none of SETTING, SET/SETTING, SET/SETTING/RESPONSE and "
            "MODEL/SET/SETTING/RESPONSE."
        )
    model = parts.pop(0) if len(parts) == 4 else None
    response = parts.pop() if len(parts) == 3 else CORRECT
    if response not in RESPONSES:
        raise UserError(
            f"The label {label!r} has the response {response!r}: give {' or '.join(RESPONSES)}."
        )
    data, setting = parts if len(parts) == 2 else ("", parts[0])
    return model, Role("", data, setting, response)


def read_run(path: str | Path) -> Results:
    """A run's directory, local or by its URL, or a file in the authors' form.

    Raises:
        UserError: Neither is there, or it cannot be read.
    """
    if is_url(path):
        return read_results(path)
    path = local_path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a run's directory or the authors' JSONL.")
    return read_results(path) if path.is_dir() else read_authors_jsonl(path, with_spectrum=False)


def read_labelled(runs: Sequence[tuple[str, str]]) -> list[Cell]:
    """The runs of `bin/report`, (label, path) each.

    The authors' files name no model. Where the label names none either, the model of the other runs is
    taken, if they all have the same.

    Raises:
        UserError: As `parse_label` and `read_cell`.
    """
    parsed = [(*parse_label(label), path) for label, path in runs]
    cells = [read_cell(dataclasses.replace(r, model=m or ""), path) for m, r, path in parsed]
    known = {cell.role.model for cell in cells} - {UNKNOWN_MODEL}
    if len(known) == 1:
        (name,) = known
        cells = [_of_model(c, name) if c.role.model == UNKNOWN_MODEL else c for c in cells]
    return cells


def _of_model(cell: Cell, model: str) -> Cell:
    role = dataclasses.replace(cell.role, model=model)
    examples = dataclasses.replace(cell.examples, label=_label(role))
    return dataclasses.replace(cell, role=role, examples=examples)


def _label(role: Role) -> str:
    return f"{role.model}, {role.title}"


def model_name(results: Results) -> str:
    """The model that a run names; `UNKNOWN_MODEL` where it does not (the authors' files)."""
    sessions = results.run.get("sessions")
    return str(sessions[-1]["info"]["model"]) if sessions else UNKNOWN_MODEL


def read_cell(role: Role, path: str | Path) -> Cell:
    """Reads a run. Its tables are reduced to arrays and dropped.

    Raises:
        UserError: As `read_run` and `example_set`.
    """
    results = read_run(path)
    if not role.model:
        role = dataclasses.replace(role, model=model_name(results))
    examples = example_set(results, _label(role))
    similarity = mean_similarity(results, examples)
    return Cell(role, path if is_url(path) else local_path(path), examples, similarity)


def check_distinct(roles: list[Role]) -> None:
    """Refuses two runs with the same role.

    Raises:
        UserError: There are two; the role is named.
    """
    for k, role in enumerate(roles):
        if role in roles[:k]:
            raise UserError(f"Two runs are called {_label(role)}: give each its own label.")
