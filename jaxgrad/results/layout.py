"""The files of a run's directory D, and how a damaged or foreign one is found.

    D/run.json                     identity, sessions, counts, and whether the run is finished
    D/examples/part-00000.parquet  the examples of a finished window
    D/matrices/part-00000.parquet  and their matrices
    D/checksums/window-00000.json  SHA-256 of both parts; the window is done when this file is there
    D/journal/                     batches of windows that are not done
    D/damaged/                     damaged files, set aside

Checksum files and batches contain a digest of the run's identity and the numbers of window and batch. So a
file of another run, or under another name, does not fit.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jaxgrad.errors import OutputError
from jaxgrad.options import with_later_options
from jaxgrad.results import schema
from jaxgrad.results.columns import EXAMPLES, MATRICES
from jaxgrad.results.lease import LEASE
from jaxgrad.results.storage import Storage, open_storage

FORMAT = 2
RUN = "run.json"
# Table, which is also the folder of its parts -> its columns.
TABLES = {"examples": EXAMPLES, "matrices": MATRICES}
FOLDERS = (*TABLES, "checksums", "journal")
DAMAGED = "damaged"
AUTHORS_FILE = "authors.jsonl"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_CHECKSUM = re.compile(r"window-(\d{5,})\.json")
_BATCH = re.compile(r"window-(\d{5,})-batch-(\d{5,})\.batch")
_UNFIT = "does not fit its checksum"


@dataclass(frozen=True)
class Damage:
    """A file of D that cannot be used.

    Attributes:
        name: Its path in D.
        reason: What is wrong, such as "does not fit its checksum".
        window: The window it belongs to.
        batch: The batch it belongs to; None for a window's part or checksum file.
    """

    name: str
    reason: str
    window: int
    batch: int | None = None


def part_name(table: str, window: int) -> str:
    """The path in D of a window's part; `table` is one of TABLES."""
    return f"{table}/part-{window:05d}.parquet"


def checksum_name(window: int) -> str:
    """The path in D of a window's checksum file. The window is done when this file is there."""
    return f"checksums/window-{window:05d}.json"


def batch_name(window: int, batch: int) -> str:
    """The path in D of a batch's file in the journal."""
    return f"journal/window-{window:05d}-batch-{batch:05d}.batch"


def load_run(directory: str | Path) -> dict[str, Any] | None:
    """The content of D/run.json; None if there is no such file.

    Args:
        directory: D, a path or a URL.

    Raises:
        OutputError: It cannot be read, is not a run's, or was altered.
    """
    return stored_run(open_storage(directory))


def stored_run(storage: Storage) -> dict[str, Any] | None:
    """As `load_run`, from D's storage."""
    file = storage.describe(RUN)
    try:
        run = json.loads(storage.read(RUN))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged_run(file, str(error)) from error
    kinds = {"format": int, "finished": bool, "identity": dict, "sessions": list, "counts": dict}
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(run, dict) or not isinstance(run.get(name), kind)
    ]
    if wrong:
        raise OutputError(
            f"{file} is not a run's: {', '.join(wrong)} missing or of a wrong type. "
            "Give another --output_dir."
        )
    if run["format"] != FORMAT:
        raise OutputError(
            f"{file} has format {run['format']}, this program writes {FORMAT}. "
            "Give another --output_dir."
        )
    digest = run.pop("sha256", None)
    if digest != _digest(run):
        raise _damaged_run(file, "its content does not fit its checksum")
    return run


def _damaged_run(file: str, why: str) -> OutputError:
    return OutputError(
        f"{file} is damaged ({why}). Remove it and run the same analyze command again: it keeps what "
        "was recorded with the same settings. Or give another --output_dir."
    )


def run_bytes(run: dict[str, Any]) -> bytes:
    """run.json with its checksum."""
    return _sealed(run)


def _sealed(content: dict[str, Any]) -> bytes:
    return (json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n").encode()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checksum_bytes(identity: dict[str, Any], window: int, parts: Mapping[str, bytes]) -> bytes:
    """The content of a window's checksum file.

    Args:
        identity: The run's.
        window: Its number.
        parts: Table -> bytes of the window's part.
    """
    digests = {table: hashlib.sha256(parts[table]).hexdigest() for table in TABLES}
    content = {"identity": _digest(identity), "window": window, **digests}
    return _sealed(content)


def encode_batch(
    identity: dict[str, Any], window: int, batch: int, results: Iterable[schema.ExampleResult]
) -> bytes:
    """The content of a batch's file."""
    return schema.encode_batch(list(results), _batch_key(identity, window, batch))


def _batch_key(identity: dict[str, Any], window: int, batch: int) -> str:
    return f"{_digest(identity)} {window} {batch}"


def finished_windows(storage: Storage) -> list[int]:
    """The windows that are done, ascending."""
    matches = map(_CHECKSUM.fullmatch, storage.names("checksums"))
    return sorted(int(match[1]) for match in matches if match)


def parts_from(storage: Storage, window: int) -> list[str]:
    """The paths in D of the parts of this and later windows."""
    return [
        f"{table}/{match[0]}"
        for table in TABLES
        for match in map(_PART.fullmatch, storage.names(table))
        if match and int(match[1]) >= window
    ]


def journal_batches(storage: Storage) -> dict[tuple[int, int], str]:
    """(window, batch) -> the path in D of the batch's file, in that order."""
    matches = [match for match in map(_BATCH.fullmatch, storage.names("journal")) if match]
    return dict(sorted(((int(m[1]), int(m[2])), f"journal/{m[0]}") for m in matches))


def read_batch(
    storage: Storage, identity: dict[str, Any], window: int, batch: int
) -> tuple[pa.Table, pa.Table]:
    """The examples and matrices of one journal file.

    Raises:
        OutputError: It is damaged.
        FileNotFoundError: It is gone: its window was finished meanwhile.
    """
    name = batch_name(window, batch)
    try:
        return schema.decode_batch(storage.read(name), _batch_key(identity, window, batch))
    except ValueError as error:
        raise OutputError(
            f"{storage.describe(name)} is damaged, or another run's. Run the same analyze command "
            "again: it computes this batch again."
        ) from error


def read_window(
    storage: Storage, identity: dict[str, Any], window: int
) -> tuple[dict[str, bytes], list[Damage]]:
    """Table -> bytes of the window's part, and what is damaged of the window."""
    name = checksum_name(window)
    parts: dict[str, bytes] = {}
    damage = []
    digests: Any = None
    try:
        digests = json.loads(storage.read(name))
    except FileNotFoundError:
        damage.append(Damage(name, "is missing", window))
    except (ValueError, RecursionError):
        damage.append(Damage(name, "is damaged", window))
    else:
        ours = {"identity": _digest(identity), "window": window}
        if not isinstance(digests, dict) or digests.pop("sha256", None) != _digest(digests):
            damage.append(Damage(name, "is damaged", window))
        elif any(digests.get(key) != value for key, value in ours.items()):
            damage.append(Damage(name, "is another run's, or another window's", window))
    if damage:
        # Without a right checksum file nothing can be said of the parts.
        return parts, damage
    for table in TABLES:
        name = part_name(table, window)
        try:
            data = storage.read(name)
        except FileNotFoundError:
            damage.append(Damage(name, "is missing", window))
            continue
        if hashlib.sha256(data).hexdigest() != digests.get(table):
            damage.append(Damage(name, _UNFIT, window))
        parts[table] = data
    return parts, damage


def find_damage(storage: Storage, run: dict[str, Any]) -> Iterator[Damage]:
    """Reads every part and every batch of D, one after the other; yields those that cannot be used."""
    done = set(finished_windows(storage))
    for window in sorted(done | set(range(run["windows"] if run["finished"] else 0))):
        damage = read_window(storage, run["identity"], window)[1]
        if damage:
            done.discard(window)
        yield from damage
    for (window, batch), name in journal_batches(storage).items():
        key = _batch_key(run["identity"], window, batch)
        if window not in done and not schema.batch_is_whole(storage.read(name), key):
            yield Damage(name, f"{_UNFIT} or is another run's", window, batch)


def is_whole(directory: str | Path) -> bool:
    """Whether nothing of a finished run is damaged or missing. Reads all of D, a path or a URL."""
    storage = open_storage(directory)
    run = stored_run(storage)
    return run is not None and not any(find_damage(storage, run))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON text. As text 1 differs from true, and NaN equals NaN."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = json.dumps(value, sort_keys=True)
    return leaves


def _with_all_options(identity: dict[str, Any]) -> dict[str, Any]:
    if "sha256" in identity.get("data", {}):
        # A run of records that were always recognized says nothing of their kind.
        usual = {"kind": "recognized", "response": "the only one", "fields": "of the usual names"}
        identity = identity | {"data": usual | identity["data"]}
    if "options" not in identity:
        return identity
    return identity | {"options": with_later_options(identity["options"])}


def refuse_other_run(
    storage: Storage, there: dict[str, Any], here: dict[str, Any], *, partial: bool = False
) -> None:
    """Compares a run's identity with the one asked for.

    An option that a run leaves out has its default value, see `AnalyzeOptions.identity`.

    Args:
        storage: D.
        there: The identity of D's run.
        here: The identity asked for.
        partial: Compare only the keys that both have.

    Raises:
        OutputError: They differ. The message names the first differences.
    """
    old, new = _flat(_with_all_options(there)), _flat(_with_all_options(here))
    keys = sorted(old.keys() & new.keys() if partial else old.keys() | new.keys())
    changes = [key for key in keys if old.get(key) != new.get(key)]
    if not changes:
        return

    def shown(text: str | None) -> str:
        if text is None:
            return "absent"
        return text if len(text) <= 60 else f"{text[:57]}..."

    told = "; ".join(
        f"{k} is {shown(old.get(k))} there, {shown(new.get(k))} here" for k in changes[:3]
    )
    rest = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    raise OutputError(
        f"{storage.describe()} holds a run with other settings: {told}{rest}. "
        "Give another --output_dir, or the same settings as before."
    )


def refuse_foreign_folder(storage: Storage, identity: dict[str, Any] | None = None) -> None:
    """Refuses a D with files but no run.json, so that a run is never mixed with the user's files.

    A run that lost only its run.json is accepted if its checksum files fit the identity.

    Args:
        storage: D.
        identity: Of the run that will be written; None while it is not known in full.

    Raises:
        OutputError: Other files are there, or the results of a run with other settings.
    """
    # A kill during the very first write leaves only its temporary, and perhaps the lease.
    names = [
        name
        for name in storage.names()
        if name != LEASE and not (name.startswith(".run.json.") and name.endswith(".tmp"))
    ]
    orphaned = "checksums" in names and {*names} <= {*FOLDERS, DAMAGED, AUTHORS_FILE}
    if not orphaned and names:
        raise OutputError(
            f"{storage.describe()} is not empty and holds no run (no run.json; it has {names[0]}). "
            "Give another --output_dir."
        )
    if identity is None or not orphaned:
        return
    windows = finished_windows(storage)
    found = [read_window(storage, identity, window)[1] for window in windows]
    if windows and all(any(d.name == checksum_name(d.window) for d in damage) for damage in found):
        raise OutputError(
            f"{storage.describe()} has no run.json, and its results are of a run with other settings. "
            "Give another --output_dir, or the settings of that run."
        )
