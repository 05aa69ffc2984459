"""The run directory: results that survive a kill at any moment.

    D/run.json                     identity, sessions, counts, and whether the run is finished
    D/examples/part-00000.parquet  a finished window's examples
    D/matrices/part-00000.parquet  and their matrices
    D/journal/                     batches of windows that are not finished

Every file is written under a temporary name, flushed to the disk and renamed, so a file under its
own name is whole. What a kill between two steps leaves, and what `RunDirectory.open` makes of it:

| killed | on the disk | afterwards |
|---|---|---|
| while a file is written | its temporary (`.name.HOST-PID.tmp`) | removed; the file counts as not written |
| before the first run.json | an empty D, or the temporary alone | a new run |
| before examples/ ... journal/ | run.json alone | the folders are made |
| between two batches | the journal's batches | the others are computed |
| after a window's matrices part | the part and the whole journal | the same bytes written again |
| after its examples part | both parts and the journal, or some of it | done; the rest is removed |
| after journal/ is removed | all parts, no mark of completion | journal/ is made, `finish` again |
"""

import errno
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from jaxgrad.errors import OutputError
from jaxgrad.results import schema
from jaxgrad.results.files import (
    atomic_file,
    lock_folder,
    names_in,
    probe_folder,
    remove_files,
    sync_folder,
    temporaries_in,
    unlock_folder,
    write_error,
)

FORMAT = 1
_FOLDERS = ("examples", "matrices", "journal")
_PART = re.compile(r"part-(\d{5,})\.parquet")
_BATCH = re.compile(r"window-(\d{5,})-batch-(\d{5,})\.batch")
_log = logging.getLogger(__name__)


def load_run(path: Path) -> dict[str, Any] | None:
    """The content of D/run.json; None when there is no such file.

    Raises:
        OutputError: It cannot be read or is not a run's.
    """
    file = path / "run.json"
    try:
        run = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"Cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise OutputError(f"{file} is damaged ({error}). Give another --output_dir.") from error
    kinds = {"format": int, "finished": bool, "identity": dict, "sessions": list, "counts": dict}
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(run, dict) or not isinstance(run.get(name), kind)
    ]
    if wrong:
        raise OutputError(
            f"{file} is not a run's: no proper {', '.join(wrong)}. Give another --output_dir."
        )
    if run["format"] != FORMAT:
        raise OutputError(
            f"{file} has format {run['format']}, this program writes {FORMAT}. "
            "Give another --output_dir."
        )
    return run


def part_path(path: Path, table: str, window: int) -> Path:
    """The part file of one window of D; `table` is examples or matrices."""
    return path / table / f"part-{window:05d}.parquet"


def windows_with_parts(path: Path) -> list[int]:
    """The finished windows of D: both of their parts are there."""
    examples, matrices = (
        {int(match[1]) for match in map(_PART.fullmatch, names_in(path / table)) if match}
        for table in ("examples", "matrices")
    )
    return sorted(examples & matrices)


def journal_batches(path: Path) -> dict[tuple[int, int], Path]:
    """The journal's files of D by (window, batch), in that order."""
    folder = path / "journal"
    matches = [match for match in map(_BATCH.fullmatch, names_in(folder)) if match]
    return dict(sorted(((int(m[1]), int(m[2])), folder / m[0]) for m in matches))


def read_batch(file: Path) -> tuple[pa.Table, pa.Table]:
    """The examples and matrices of one journal file.

    Raises:
        OutputError: It is damaged. (FileNotFoundError passes: its window was finished meanwhile.)
    """
    try:
        return schema.decode_batch(file.read_bytes())
    except ValueError as error:
        raise OutputError(
            f"{file} is damaged. Run the same analyze command again: it computes this batch anew."
        ) from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key, as JSON text: text tells 1 from true, and NaN equals itself."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = json.dumps(value, sort_keys=True)
    return leaves


def _refuse_other_run(
    path: Path, there: dict[str, Any], here: dict[str, Any], *, partial: bool = False
) -> None:
    """Compares identities; with `partial` only the keys that both have."""
    old, new = _flat(there), _flat(here)
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
        f"{path} holds a run with other settings: {told}{rest}. "
        "Give another --output_dir, or the same settings as before."
    )


def _refuse_foreign_folder(path: Path) -> None:
    """Refuses a folder with files but no run.json: nothing of the user's may be mixed with ours."""
    # A kill during the very first write leaves its temporary alone in D.
    own = {file.name for file in temporaries_in(path) if file.name.startswith(".run.json.")}
    names = [name for name in names_in(path) if name not in own]
    if names:
        raise OutputError(
            f"{path} is not empty and holds no run (no run.json; it has {names[0]}). "
            "Give another --output_dir."
        )


def _json_copy(value: dict[str, Any], **options: Any) -> dict[str, Any]:
    # As it will be read back: tuples are lists, keys are strings.
    return json.loads(json.dumps(value, **options))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """One run's results on disk. Made by `RunDirectory.open`; one process at a time.

    Every method that writes raises `OutputError` when the disk is full or cannot be written; what was
    recorded before stays, and the same command continues from it. A call that a right plan cannot
    make (a batch recorded twice, a finished run written to) raises ValueError.

    Attributes:
        path: The directory D.
        run: What run.json holds: format, finished, identity, sessions, counts; when finished also
            windows (how many parts) and finished_at.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path = path
        self.run = run

    @classmethod
    def open(
        cls,
        path: str | Path,
        identity: dict[str, Any],
        info: dict[str, Any],
        *,
        leads: bool = True,
    ) -> Self:
        """Starts a run in D, or continues the one that is there.

        A finished run of the same identity is returned as it is; nothing in it is touched. Of several
        processes that write one run, one leads: it holds the lock, notes the session and puts in order
        what a killed one left. The others open D when it has done so.

        Args:
            path: D; made when it is not there.
            identity: What the numbers depend on, JSON-able; compared key by key.
            info: What may differ between sessions (versions, device, command); noted in `sessions`.
            leads: Whether this process is the one that leads.

        Raises:
            OutputError: D cannot be made or written, is not empty and not a run, holds a damaged
                run.json or a run of another identity, or another process is writing it. One that does
                not lead finds no run.
        """
        path = Path(path)
        identity = _json_copy(identity)
        if not leads:
            run = load_run(path)
            if run is None:
                raise OutputError(
                    f"{path} holds no run that process 0 began. Give every process one shared --output_dir."
                )
            _refuse_other_run(path, run["identity"], identity)
            return cls(path, run)
        try:
            os.makedirs(path, exist_ok=True)
            lock_folder(path)
            run = load_run(path)
            if run is None:
                _refuse_foreign_folder(path)
                run = {"format": FORMAT, "finished": False, "identity": identity}
                run |= {"sessions": [], "counts": {}}
            else:
                _refuse_other_run(path, run["identity"], identity)
            opened = cls(path, run)
            if opened.finished:
                opened.close()
            else:
                opened._start_session(_json_copy(info, default=str))
        except BaseException as error:
            unlock_folder(path)
            if isinstance(error, OSError):
                raise write_error(path, error) from error
            raise
        return opened

    @staticmethod
    def check_compatible(path: str | Path, partial_identity: dict[str, Any]) -> None:
        """Refuses early, before a model is loaded, what `open` would refuse. Writes nothing.

        Only the keys that both identities have are compared.

        Raises:
            OutputError: As `open`.
        """
        run = load_run(Path(path))
        if run is not None:
            _refuse_other_run(
                Path(path), run["identity"], _json_copy(partial_identity), partial=True
            )
        elif Path(path).is_dir():
            _refuse_foreign_folder(Path(path))

    @staticmethod
    def probe(path: str | Path) -> None:
        """Tests that D can be made and written, and leaves nothing behind.

        Raises:
            OutputError: It cannot: a file in the way, no permission, a full disk.
        """
        run = load_run(Path(path))
        # A finished run will not be written.
        if run is None or not run["finished"]:
            probe_folder(Path(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes write D; the end of the process does it too."""
        unlock_folder(self.path)

    @property
    def finished(self) -> bool:
        """Whether the run is complete; then nothing in D changes any more."""
        return self.run["finished"]

    def window_done(self, window: int) -> bool:
        """Whether the window's parts are written."""
        return all(part_path(self.path, name, window).exists() for name in ("examples", "matrices"))

    def batch_done(self, window: int, batch: int) -> bool:
        """Whether the batch's results are recorded, in the journal or in the window's parts."""
        return self._batch_path(window, batch).exists() or self.window_done(window)

    def write_batch(self, window: int, batch: int, results: Sequence[schema.ExampleResult]) -> None:
        """Records one batch; once this returns, no kill can lose it."""
        self._refuse_when_finished()
        if self.batch_done(window, batch):
            raise ValueError(f"batch {batch} of window {window} is recorded already")
        with atomic_file(self._batch_path(window, batch)) as file:
            file.write(schema.encode_batch(results))

    def finish_window(
        self,
        window: int,
        skipped: Sequence[schema.ExampleResult] = (),
        *,
        num_examples: int | None = None,
    ) -> None:
        """Merges the window's batches and the skipped examples into its parts, by example_index.

        Calling it for a window that is done only removes what is left of its journal.

        Args:
            window: Its number.
            skipped: Rows of the examples that no batch holds.
            num_examples: How many examples the window has; given, it is checked.

        Raises:
            ValueError: An example is there twice, or their number is not `num_examples`.
            OutputError: A batch was damaged since it was written, or D cannot be written.
        """
        self._refuse_when_finished()
        if not self.window_done(window):
            files = [file for key, file in journal_batches(self.path).items() if key[0] == window]
            batches = [read_batch(file) for file in files]
            tables = {
                "matrices": [schema.matrices_table(skipped), *(pair[1] for pair in batches)],
                "examples": [schema.examples_table(skipped), *(pair[0] for pair in batches)],
            }
            merged = {
                name: schema.sort_by_example(pa.concat_tables(parts))
                for name, parts in tables.items()
            }
            indices = merged["examples"].column("example_index").to_pylist()
            if len(set(indices)) != len(indices):
                raise ValueError(f"window {window} has an example twice")
            if num_examples not in (None, len(indices)):
                raise ValueError(f"window {window}: {len(indices)} examples, not {num_examples}")
            # The examples part last: it is what makes the window done.
            for name, table in merged.items():
                with atomic_file(part_path(self.path, name, window)) as file:
                    file.write(schema.parquet_bytes(table))
        remove_files(file for key, file in journal_batches(self.path).items() if key[0] == window)

    def update(self, counts: dict[str, Any]) -> None:
        """Notes the counts of a run that is not finished."""
        self._refuse_when_finished()
        self._write_run({**self.run, "counts": counts})

    def finish(self, counts: dict[str, Any]) -> None:
        """Marks the run as finished; the mark is the last thing written.

        Raises:
            ValueError: A window is not finished.
        """
        self._refuse_when_finished()
        windows = windows_with_parts(self.path)
        if journal_batches(self.path) or windows != list(range(len(windows))):
            raise ValueError("finish was called before every window was finished")
        try:
            os.rmdir(self.path / "journal")
            sync_folder(self.path)
        except OSError as error:
            # Gone after an attempt that failed later; or a file not ours is in it, and stays.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise write_error(self.path, error) from error
        ended = {"finished": True, "windows": len(windows), "finished_at": _now()}
        self._write_run({**self.run, "counts": counts, **ended})
        self.close()

    def _start_session(self, info: dict[str, Any]) -> None:
        """Notes the session and puts in order what a killed one left."""
        for folder in (self.path, *(self.path / name for name in _FOLDERS)):
            remove_files(temporaries_in(folder))
        session = {"started": _now(), "info": info}
        # run.json before the folders: a D with files in it and no run.json is not a run.
        self._write_run({**self.run, "sessions": [*self.run["sessions"], session]})
        for name in _FOLDERS:
            os.makedirs(self.path / name, exist_ok=True)
        sync_folder(self.path)
        journal = journal_batches(self.path)
        done = set(windows_with_parts(self.path))
        leftover = [file for (window, _), file in journal.items() if window in done]
        for (window, batch), file in journal.items():
            if window not in done and not schema.batch_is_whole(file.read_bytes()):
                _log.warning("%s is damaged: batch %d is computed again", file, batch)
                leftover.append(file)
        remove_files(leftover)

    def _batch_path(self, window: int, batch: int) -> Path:
        return self.path / "journal" / f"window-{window:05d}-batch-{batch:05d}.batch"

    def _write_run(self, run: dict[str, Any]) -> None:
        text = json.dumps(run, indent=2) + "\n"
        with atomic_file(self.path / "run.json") as file:
            file.write(text.encode())
        self.run = json.loads(text)

    def _refuse_when_finished(self) -> None:
        if self.finished:
            raise ValueError(f"{self.path} is finished")
