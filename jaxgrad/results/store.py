"""The run directory D: written so that a kill at any moment loses nothing, and damage is found.

`jaxgrad.results.layout` lists the files of D. Every file is written under a temporary name, flushed to the
disk and renamed, or put whole into an object store. So a file under its own name is complete. This is what
a kill leaves, and what `RunDirectory.open` makes of it:

| killed | in D | what the next session does |
|---|---|---|
| while a file is written | its temporary (`.name.HOST-PID.tmp`) | removes it; the file is not written yet |
| before the first run.json | nothing, or its temporary | starts a new run |
| before examples/ ... journal/ | run.json only | makes the folders |
| between two batches | the journal's batches | computes the other batches |
| after a window's matrices part | the part and the whole journal | writes the same bytes again |
| after its examples part | both parts and the whole journal | writes the same bytes again |
| after its checksums | the window, and all or some of the journal | removes the rest of the journal |
| after journal/ is removed | all parts, an unfinished run.json | makes journal/, calls `finish` again |
| after a damaged part is set aside | its window's checksums | finds the window damaged again |
| while it holds an object store's lease | `lock.json` | takes it over after 60 s (see `lease`) |

When a run is opened, finished or not, a file that does not fit its checksum is moved to `damaged/` with a
warning. Its window or batch is computed again and gives the same bytes.
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
    # As it is read back: tuples become lists, keys become strings.
    return json.loads(json.dumps(value, **options))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """One run's results on disk or in an object store. Made by `RunDirectory.open`.

    Methods that write raise `OutputError` if the disk is full or cannot be written. What was recorded
    stays, and the same command continues from it. They raise `ValueError` for a wrong call: a window that
    lacks batches, or a finished run.

    Attributes:
        path: The directory D as it was given: a path or a URL.
        run: The content of run.json: format, finished, identity, sessions, counts. Of a finished run also
            windows (their number) and finished_at.
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

        A finished run of the same identity is returned untouched. If a part of it is damaged, the run
        becomes unfinished, and that part's window must be computed again.

        If several processes write one run, one of them leads. It locks D, records the session, sets
        damaged files aside and cleans up after a killed session. The others open D afterwards.

        Args:
            path: D, a path or a URL. It is made if it is missing.
            identity: What the numbers depend on, as JSON values. It is compared key by key.
            info: What may differ between sessions (versions, device, command). It is kept in `sessions`.
            leads: Whether this process leads.

        Raises:
            OutputError: D cannot be made or written, or holds other files, a damaged run.json or a run of
                another identity. Or another process is writing it. Or this process does not lead and
                finds no run.
        """
        storage = open_storage(path)
        identity = _json_copy(identity)
        if not leads:
            run = layout.stored_run(storage)
            if run is None:
                raise OutputError(
                    f"{path} holds no run that process 0 began. Give all processes the same, shared "
                    "--output_dir."
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
        """Refuses before a model is loaded what `open` would refuse later. Writes nothing.

        Args:
            path: D, a path or a URL.
            partial_identity: What is known of the identity. Only keys that both sides have are compared.

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
        """Tests that D can be made and written. Leaves nothing behind.

        Raises:
            OutputError: It cannot: a file is in the way, there is no permission, or the disk is full.
        """
        run = load_run(path)
        # A finished run is not written.
        if run is None or not run["finished"]:
            open_storage(path).probe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlocks D for other processes, as the end of the process does."""
        self._storage.unlock()

    @property
    def finished(self) -> bool:
        """Whether the run is complete. Then nothing in D changes any more."""
        return self.run["finished"]

    def window_done(self, window: int) -> bool:
        """Whether the window's parts and their checksums are written."""
        return self._storage.exists(layout.checksum_name(window))

    def journaled_batches(self) -> Set[tuple[int, int]]:
        """The batches in the journal, as (window, batch)."""
        return layout.journal_batches(self._storage).keys()

    def finished_windows(self) -> list[int]:
        """The windows that are done, ascending."""
        return layout.finished_windows(self._storage)

    def write_batch(self, window: int, batch: int, results: Sequence[schema.ExampleResult]) -> None:
        """Records one batch. Once this returns, no kill can lose it.

        Safe to repeat: rewriting a batch gives the same bytes. If its window is done, nothing is written.
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
        """Merges the window's batches and the skipped examples into its parts, sorted by example_index.

        For a window that is done it only removes what is left of its journal.

        Args:
            window: Its number.
            skipped: Rows of the examples that are in no batch.
            num_examples: How many examples the window must have; None for any number.

        Raises:
            ValueError: An example is there twice, or their number is not `num_examples`.
            OutputError: A batch was damaged after it was written, or D cannot be written.
        """
        self._refuse_when_finished()
        identity = self.run["identity"]
        journal = [key for key in layout.journal_batches(self._storage) if key[0] == window]
        if not self.window_done(window):
            batches = [layout.read_batch(self._storage, identity, *key) for key in journal]
            # The parts are written in this order.
            pieces = {
                "matrices": [schema.matrices_table(skipped), *(pair[1] for pair in batches)],
                "examples": [schema.examples_table(skipped), *(pair[0] for pair in batches)],
            }
            merged = {
                table: schema.sort_by_example(schema.joined(rows)) for table, rows in pieces.items()
            }
            indices = merged["examples"].column("example_index").to_pylist()
            if len(set(indices)) != len(indices):
                raise ValueError(f"window {window} has an example twice")
            if num_examples not in (None, len(indices)):
                raise ValueError(f"window {window}: {len(indices)} examples, not {num_examples}")
            parts = {table: schema.parquet_bytes(rows) for table, rows in merged.items()}
            for table, data in parts.items():
                self._storage.write(layout.part_name(table, window), data)
            # The checksums last: with them the window is done.
            checksums = layout.checksum_bytes(identity, window, parts)
            self._storage.write(layout.checksum_name(window), checksums)
        self._storage.remove(layout.batch_name(*key) for key in journal)

    def finish(self, counts: dict[str, Any]) -> None:
        """Marks the run as finished, after everything else is written.

        Args:
            counts: What run.json says of the run's examples and programs, as JSON values.

        Raises:
            ValueError: A window is not done.
        """
        self._refuse_when_finished()
        windows = layout.finished_windows(self._storage)
        journal = layout.journal_batches(self._storage)
        if windows != list(range(len(windows))) or not {w for w, _ in journal} <= set(windows):
            raise ValueError("finish was called before every window was finished")
        # A session that was taken for dead may have recorded a batch of a window that was done.
        self._storage.remove(journal.values())
        for name in layout.parts_from(self._storage, len(windows)):
            self._set_aside(name, "is no part of this run")
        self._storage.remove_folder("journal")
        ended = {"finished": True, "windows": len(windows), "finished_at": _now()}
        self._write_run({**self.run, "counts": counts, **ended})
        self.close()

    def _start_session(self, info: dict[str, Any], damage: Sequence[Damage]) -> None:
        """Records the session, cleans up after a killed one and sets damaged files aside."""
        storage = self._storage
        storage.clean(layout.FOLDERS)
        session = {"started": _now(), "info": info}
        run = {
            key: value for key, value in self.run.items() if key not in ("windows", "finished_at")
        }
        # run.json before the folders, because a D with other files and no run.json is not a run. Also
        # before damaged files are moved, because a run without them is not finished.
        self._write_run({**run, "finished": False, "sessions": [*run["sessions"], session]})
        storage.make_folders(layout.FOLDERS)
        for found in damage:
            again = f"window {found.window}" if found.batch is None else f"batch {found.batch}"
            self._set_aside(found.name, f"{found.reason}; {again} is computed again")
        # Checksums after the parts: after a kill between the two the window still counts as damaged.
        bad = {found.window for found in damage if found.batch is None}
        storage.remove(layout.checksum_name(window) for window in sorted(bad))
        done = set(layout.finished_windows(storage))
        journal = layout.journal_batches(storage)
        storage.remove(name for (window, _), name in journal.items() if window in done)

    def _set_aside(self, name: str, why: str) -> None:
        """Moves a file to `damaged/` under a number of its own, with a warning."""
        location = self._storage.describe(name)
        try:
            self._storage.read(name)
        except FileNotFoundError:
            _log.warning("%s %s", location, why)
            return
        stem = name.replace("/", "-")
        taken = set(self._storage.names(layout.DAMAGED))
        number = next(k for k in range(1, len(taken) + 2) if f"{stem}.{k}" not in taken)
        target = f"{layout.DAMAGED}/{stem}.{number}"
        self._storage.move(name, target)
        _log.warning(
            "%s %s (the file is kept as %s)", location, why, self._storage.describe(target)
        )

    def _write_run(self, run: dict[str, Any]) -> None:
        run = _json_copy(run)
        self._storage.write(layout.RUN, layout.run_bytes(run))
        self.run = run

    def _refuse_when_finished(self) -> None:
        if self.finished:
            raise ValueError(f"{self.path} is finished")
