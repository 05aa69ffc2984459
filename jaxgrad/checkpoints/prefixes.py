"""Names of weights as training programs save them, with the prefixes of wrappers around the model.

| who | what the names look like |
|---|---|
| DataParallel, DDP, DeepSpeed | `module.model.layers.0...` |
| torch.compile | `_orig_mod.model.layers.0...`, also in the middle of a name |
| FSDP | `_fsdp_wrapped_module.` before any part |
| activation checkpointing | `_checkpoint_wrapped_module.` before any part |
| PEFT | `base_model.model.model.layers.0...` |
| Lightning, or any class with a `model` of its own | `model.model.layers.0...`, `model.lm_head.weight` |
| the inner model alone | `layers.0...` |
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from jaxgrad.errors import UserError
from jaxgrad.models.families import Family

# No module of a family has one of these names.
WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
LEADS = ("base_model.model.", "base_model.", "model.")
MOST_LEADS = 4  # that a name can have in front
Edits = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How names of files become those of a key table.

    Attributes:
        names: name in the table -> name in the files. Names outside the text decoder are left out.
        edits: what was stripped or added, in words, with counts; "" if nothing was.
    """

    names: dict[str, str]
    edits: str


def fit_name(name: str, family: Family, known: Collection[str]) -> tuple[str | None, Edits]:
    """The first form of a name that is in the table, and what makes it so.

    Args:
        name: as the files have it.
        family: whose key table it is.
        known: the names in the table.

    Returns:
        The name in the table, None for a weight outside the text decoder, or the name itself if no form
        fits; and the edits, such as "without 'module.'".
    """
    for form, edits in _forms(name, base_prefix(known)):
        canonical = family.canonical(form)
        if canonical is None or canonical in known:
            return canonical, edits
    return family.canonical(name), ()


def fit_names(names: Iterable[str], family: Family, known: Collection[str], where: str) -> Fit:
    """The names in the table of all names in the files.

    Raises:
        UserError: two names become the same one.
    """
    counts: Counter[str] = Counter()

    def pairs() -> Iterator[tuple[str | None, str]]:
        for name in names:
            canonical, edits = fit_name(name, family, known)
            yield canonical, name
            counts.update(edits if canonical is not None else ())

    found = each_once(pairs(), where)
    return Fit(found, ", ".join(f"{edit} ({count})" for edit, count in counts.items()))


def each_once(pairs: Iterable[tuple[str | None, str]], where: str) -> dict[str, str]:
    """(name in the table, name in the files) as a table, without those of no name in the table.

    Raises:
        UserError: two names in the files have the same name in the table.
    """
    found: dict[str, str] = {}
    for canonical, name in pairs:
        if canonical is None:
            continue
        if canonical in found:
            raise UserError(
                f"{where}: {name} and {found[canonical]} are the same weight; "
                "a checkpoint must hold each weight once: remove the one that is not meant"
            )
        found[canonical] = name
    return found


def base_prefix(known: Collection[str]) -> str:
    """What most names of a table begin with, such as "model."."""
    firsts = Counter(name.split(".", 1)[0] for name in known)
    return f"{firsts.most_common(1)[0][0]}." if firsts else ""


def _forms(name: str, base: str) -> Iterator[tuple[str, Edits]]:
    """The forms of a name, those with fewer edits first."""
    yield name, ()
    parts = name.split(".")
    core = ".".join(part for part in parts if part not in WRAPPERS)
    edits = tuple(f"without '{part}.'" for part in dict.fromkeys(parts) if part in WRAPPERS)
    forms = [(core, edits)]
    for _ in range(MOST_LEADS):
        lead = next((lead for lead in LEADS if core.startswith(lead)), None)
        if lead is None:
            break
        core, edits = core.removeprefix(lead), (*edits, f"without '{lead}'")
        forms.append((core, edits))
    yield from forms
    for form, edits in forms:
        yield base + form, (*edits, f"with '{base}' in front")
