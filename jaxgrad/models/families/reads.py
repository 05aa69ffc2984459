"""What transformers reads of a config.json, by model type: from the checked-in list and what is installed.

`docs/config_reads.py` makes the list from several versions of transformers. The installed one is searched
if it is not among them, or if the list lacks the model type.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from jaxgrad.models.families.attributes import IRRELEVANT, Rules
from jaxgrad.models.families.transformers_source import SourceReads, read_source

NEUTRAL: dict[str, Any] = {"pruned_heads": {}}  # the source states another default besides
FILE = Path(__file__).with_name("read_by_transformers.json")


@dataclasses.dataclass(frozen=True)
class Reads:
    """What any of the versions reads for a model type.

    Attributes:
        names: attributes.
        neutral: attribute -> the one value that the source states as its default. An attribute whose
            default changed over the versions is not in it.
        ropes: kind of rope -> keys of the rope's object that count.
        generation: settings of text generation, which no forward pass reads.
        newest: the newest version.
    """

    names: frozenset[str]
    neutral: Mapping[str, Any]
    ropes: Mapping[str, frozenset[str]]
    generation: frozenset[str]
    newest: str


def rules_for(model_type: str, writer: Any) -> Rules:
    """What of a config.json need not be understood.

    Args:
        model_type: of the attributes.
        writer: the version of transformers that wrote the file. One that is newer than all that were
            searched may read attributes that those do not know, so then every name counts.
    """
    config_class, reads = CONFIG_MAPPING[model_type], reads_of(model_type)
    is_newer = isinstance(writer, str) and version_key(writer)[:2] > version_key(reads.newest)[:2]
    return Rules(
        neutral={**reads.neutral, **NEUTRAL, **config_class().to_dict()},
        irrelevant=IRRELEVANT | reads.generation,
        counts=None if is_newer else reads.names,
        ropes=None if is_newer else reads.ropes,
        aliases=config_class.attribute_map,
        advice=(
            f"transformers {writer} wrote the file, and what it reads is known up to {reads.newest}, so "
            "upgrade transformers, or "
        )
        if is_newer
        else "",
    )


@functools.cache
def reads_of(model_type: str) -> Reads:
    """What transformers reads for a model type of `FAMILIES`."""
    listed = json.loads(FILE.read_text("utf-8"))
    parts, version = [listed], transformers.__version__
    if version not in listed["versions"] or model_type not in listed["model_types"]:
        found = read_source(Path(transformers.__file__).parent, model_type)
        if found is not None:
            parts.append(merge_reads({version: {model_type: found}}))
    own = _union([part["model_types"].get(model_type, {}) for part in parts])
    defaults = _union([own, *(part["everywhere"] for part in parts)])
    ropes: dict[str, set[str]] = {}
    for part in parts:
        for kind, keys in part["ropes"].items():
            ropes.setdefault(kind, set()).update(keys)
    special = set().union(*ropes.values())
    # Keys that only this model's code reads count in ropes of every kind.
    shared = {name.removeprefix("rope.") for name in own if name.startswith("rope.")} - special
    generation = {name for part in parts for name in part["generation"]} - own.keys()
    return Reads(
        names=frozenset(name for name in defaults if not name.startswith("rope.")),
        neutral={name: values[0] for name, values in defaults.items() if len(values) == 1},
        ropes={kind: frozenset(keys | shared) for kind, keys in ropes.items()},
        generation=frozenset(generation),
        newest=max((*listed["versions"], version), key=version_key),
    )


def merge_reads(by_version: Mapping[str, Mapping[str, SourceReads]]) -> dict[str, Any]:
    """The list's content.

    Args:
        by_version: version -> model type -> what that version reads.
    """
    every = [(kind, reads) for found in by_version.values() for kind, reads in found.items()]
    kinds = dict.fromkeys(kind for kind, _ in every)
    ropes: dict[str, set[str]] = {}
    for _, reads in every:
        for name, keys in reads.ropes.items():
            ropes.setdefault(name, set()).update(keys)
    return {
        "versions": sorted(by_version, key=version_key),
        "everywhere": _union([reads.everywhere for _, reads in every]),
        "generation": sorted({name for _, reads in every for name in reads.generation}),
        "ropes": {name: sorted(keys) for name, keys in ropes.items()},
        "model_types": {
            kind: _union([reads.attributes for other, reads in every if other == kind])
            for kind in kinds
        },
    }


def version_key(version: str) -> tuple[int, ...]:
    """A version's release numbers, for comparing: "5.10.0.dev0" gives (5, 10, 0)."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal() or len(part) > 9:
            break
        numbers.append(int(part))
    return tuple(numbers)


def _union(tables: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    merged: dict[str, list[Any]] = {}
    for table in tables:
        for name, values in table.items():
            known = merged.setdefault(name, [])
            known.extend(value for value in values if value not in known)
    return merged
