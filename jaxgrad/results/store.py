"""The run directory: results that survive a kill at any moment, and are found out when they are damaged.

`jaxgrad.results.layout` says what stands where in D. Every file is written under a temporary name,
flushed to the disk and renamed (or put whole into an object store), so a file under its own name was
written whole. What a kill between two steps leaves, and what `RunDirectory.open` makes of it:

| killed | on the disk | afterwards |
|---|---|---|
| while a file is written | its temporary (`.name.HOST-PID.tmp`) | removed; the file counts as not written |
| before the first run.json | an empty D, or the temporary alone | a new run |
| before examples/ ... journal/ | run.json alone | the folders are made |
| between two batches | the journal's batches | the others are computed |
| after a window's matrices part | the part and the whole journal | the same bytes written again |
| after its examples part | both parts and the whole journal | the same bytes written again |
| after its checksums | the window and the journal, or some of it | done; the rest is removed |
| after journal/ is removed | all parts, no mark of completion | journal/ is made, `finish` again |
| after a damaged part is set aside | its window's checksums | the window counts as damaged again |
| while it holds an object store's lease | `lock.json` | taken over after 60 s (see `lease`) |

What does not fit its checksum when a run is opened, finished or not, is moved to `damaged/` with a
warning, and its window (or its batch) is computed again: the same bytes come out.
"""

import json
import logging
from collections.abc import Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from jaxgrad.errors import OutputError
from jaxgrad.results import layout, schema
from jaxgrad.results.layout import Damage, load_run
from jaxgrad.results.storage import Storage, open_storage

_log = logging.getLogger(__name__)


def _json_copy(value: dict[str, Any], **options: Any) -> dict[str, Any]:
    # As it will be read back: tuples are lists, keys are strings.
    return json.loads(json.dumps(value, **options))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """One run's results on disk or in an object store. Made by `RunDirectory.open`.

    Every method that writes raises `OutputError` when the disk is full or cannot be written; what was
    recorded before stays, and the same command continues from it. A call that a right plan cannot
    make (a window without some of its batches, a finished run written to) raises ValueError.

    Attributes:
        path: The directory D, as it was given: a path or a URL.
        run: What run.json holds: format, finished, identity, sessions, counts; when finished also
            windows (how many parts) and finished_at.
    """

    def __init__(self, path: str | Path, storage: Storage, run: dict[str, Any]) -> None:
        self.path = path
        self.run = run
        self._storage = storage

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

        A finished run of the same identity is returned as it is and nothing in it is touched, unless a
        part of it is damaged: then it is not finished any more, and that part's window is to be
        computed again. Of several processes that write one run, one leads: it holds the lock, notes the
        session, sets aside what is damaged and puts in order what a killed one left. The others open D
        when it has done so.

        Args:
            path: D, a path or a URL; made when it is not there.
            identity: What the numbers depend on, JSON-able; compared key by key.
            info: What may differ between sessions (versions, device, command); noted in `sessions`.
            leads: Whether this process is the one that leads.

        Raises:
            OutputError: D cannot be made or written, is not empty and not a run, holds a damaged
                run.json or a run of another identity, or another process is writing it. One that does
                not lead finds no run.
        """
        storage = open_storage(path)
        identity = _json_copy(identity)
        if not leads:
            run = layout.stored_run(storage)
            if run is None:
                raise OutputError(
                    f"{path} holds no run that process 0 began. Give every process one shared --output_dir."
                )
            layout.refuse_other_run(storage, run["identity"], identity)
            return cls(path, storage, run)
        try:
            storage.make_folders()
            storage.lock()
            run = layout.stored_run(storage)
            if run is None:
                layout.refuse_foreign_folder(storage, identity)
                run = {"format": layout.FORMAT, "finished": False, "identity": identity}
                run |= {"sessions": [], "counts": {}}
            else:
                layout.refuse_other_run(storage, run["identity"], identity)
            opened = cls(path, storage, run)
            damage = list(layout.find_damage(storage, run))
            if opened.finished and not damage:
                opened.close()
            else:
                opened._start_session(_json_copy(info, default=str), damage)
        except BaseException:
            storage.unlock()
            raise
        return opened

    @staticmethod
    def check_compatible(path: str | Path, partial_identity: dict[str, Any]) -> None:
        """Refuses early, before a model is loaded, what `open` would refuse. Writes nothing.

        Only the keys that both identities have are compared.

        Raises:
            OutputError: As `open`.
        """
        storage = open_storage(path)
        run = layout.stored_run(storage)
        if run is None:
            layout.refuse_foreign_folder(storage)
        else:
            partial = _json_copy(partial_identity)
            layout.refuse_other_run(storage, run["identity"], partial, partial=True)

    @staticmethod
    def probe(path: str | Path) -> None:
        """Tests that D can be made and written, and leaves nothing behind.

        Raises:
            OutputError: It cannot: a file in the way, no permission, a full disk.
        """
        run = load_run(path)
        # A finished run will not be written.
        if run is None or not run["finished"]:
            open_storage(path).probe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes write D; the end of the process does it too."""
        self._storage.unlock()

    @property
    def finished(self) -> bool:
        """Whether the run is complete; then nothing in D changes any more."""
        return self.run["finished"]

    def window_done(self, window: int) -> bool:
        """Whether the window's parts are written, and their checksums."""
        return self._storage.exists(layout.checksum_name(window))

    def batch_done(self, window: int, batch: int) -> bool:
        """Whether the batch's results are recorded, in the journal or in the window's parts."""
        return self._storage.exists(layout.batch_name(window, batch)) or self.window_done(window)

    def journaled_batches(self) -> Set[tuple[int, int]]:
        """The batches (window, batch) that are in the journal."""
        return layout.journal_batches(self._storage).keys()

    def finished_windows(self) -> list[int]:
        """The windows that are done, ascending."""
        return layout.finished_windows(self._storage)

    def write_batch(self, window: int, batch: int, results: Sequence[schema.ExampleResult]) -> None:
        """Records one batch; once this returns, no kill can lose it.

        Of several processes one may find that another, of a session that was killed but lives on, has
        recorded the batch before it: the same bytes are written again, and nothing is where the window
        is done.
        """
        self._refuse_when_finished()
        if not self.window_done(window):
            data = layout.encode_batch(self.run["identity"], window, batch, results)
            self._storage.write(layout.batch_name(window, batch), data)

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
        identity = self.run["identity"]
        journal = [key for key in layout.journal_batches(self._storage) if key[0] == window]
        if not self.window_done(window):
            batches = [layout.read_batch(self._storage, identity, *key) for key in journal]
            tables = {
                "matrices": [schema.matrices_table(skipped), *(pair[1] for pair in batches)],
                "examples": [schema.examples_table(skipped), *(pair[0] for pair in batches)],
            }
            merged = {
                name: schema.sort_by_example(schema.joined(parts))
                for name, parts in tables.items()
            }
            indices = merged["examples"].column("example_index").to_pylist()
            if len(set(indices)) != len(indices):
                raise ValueError(f"window {window} has an example twice")
            if num_examples not in (None, len(indices)):
                raise ValueError(f"window {window}: {len(indices)} examples, not {num_examples}")
            parts = {name: schema.parquet_bytes(table) for name, table in merged.items()}
            for name, data in parts.items():
                self._storage.write(layout.part_name(name, window), data)
            # The checksums last: they are what makes the window done.
            checksums = layout.checksum_bytes(identity, window, parts)
            self._storage.write(layout.checksum_name(window), checksums)
        self._storage.remove(layout.batch_name(*key) for key in journal)

    def finish(self, counts: dict[str, Any]) -> None:
        """Marks the run as finished; the mark is the last thing written.

        Raises:
            ValueError: A window is not finished.
        """
        self._refuse_when_finished()
        windows = layout.finished_windows(self._storage)
        journal = layout.journal_batches(self._storage)
        if windows != list(range(len(windows))) or not {w for w, _ in journal} <= set(windows):
            raise ValueError("finish was called before every window was finished")
        # Of a window that was done already when a killed session, living on, recorded a batch of it.
        self._storage.remove(journal.values())
        for name in layout.parts_from(self._storage, len(windows)):
            self._set_aside(name, "is no part of this run")
        self._storage.remove_folder("journal")
        ended = {"finished": True, "windows": len(windows), "finished_at": _now()}
        self._write_run({**self.run, "counts": counts, **ended})
        self.close()

    def _start_session(self, info: dict[str, Any], damage: Sequence[Damage]) -> None:
        """Notes the session, puts in order what a killed one left and sets aside what is damaged."""
        storage = self._storage
        storage.clean(layout.FOLDERS)
        session = {"started": _now(), "info": info}
        run = {
            key: value for key, value in self.run.items() if key not in ("windows", "finished_at")
        }
        # run.json before the folders: a D with files in it and no run.json is not a run. And before
        # damaged files are moved: a run that lacks them is not finished.
        self._write_run({**run, "finished": False, "sessions": [*run["sessions"], session]})
        storage.make_folders(layout.FOLDERS)
        for found in damage:
            again = f"window {found.window}" if found.batch is None else f"batch {found.batch}"
            self._set_aside(found.name, f"{found.reason}; {again} is computed again")
        # After the parts: a kill in between leaves a window that counts as damaged.
        bad = {found.window for found in damage if found.batch is None}
        storage.remove(layout.checksum_name(window) for window in sorted(bad))
        done = set(layout.finished_windows(storage))
        journal = layout.journal_batches(storage)
        storage.remove(name for (window, _), name in journal.items() if window in done)

    def _set_aside(self, name: str, why: str) -> None:
        told = self._storage.describe(name)
        try:
            self._storage.read(name)
        except FileNotFoundError:
            _log.warning("%s %s", told, why)
            return
        kept = name.replace("/", "-")
        taken = set(self._storage.names(layout.DAMAGED))
        number = next(k for k in range(1, len(taken) + 2) if f"{kept}.{k}" not in taken)
        target = f"{layout.DAMAGED}/{kept}.{number}"
        self._storage.move(name, target)
        _log.warning("%s %s (the file is kept as %s)", told, why, self._storage.describe(target))

    def _write_run(self, run: dict[str, Any]) -> None:
        run = _json_copy(run)
        self._storage.write(layout.RUN, layout.run_bytes(run))
        self.run = run

    def _refuse_when_finished(self) -> None:
        if self.finished:
            raise ValueError(f"{self.path} is finished")
