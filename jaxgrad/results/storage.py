"""Where a run's files are: in a local folder, or in an object store that fsspec can write.

Both classes have the same methods. A file's name is its path inside the run's directory D, such as
"journal/x". What is written appears under its name whole or not at all. On a local disk this takes a
temporary name, a flush and a rename. In an object store every put is so.

| D is given as | class |
|---|---|
| a path, `file:///...` | `LocalStorage` |
| `gs://...` (extra `gcs`), `s3://...` (extra `s3`), `memory://...`, others of fsspec | `ObjectStorage` |
"""

import contextlib
import errno
import os
import re
import secrets
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs

from jaxgrad.errors import OutputError, UserError
from jaxgrad.results.files import (
    atomic_file,
    lock_folder,
    move_file,
    names_in,
    probe_folder,
    remove_files,
    sync_folder,
    temporaries_in,
    unlock_folder,
    write_error,
)
from jaxgrad.results.lease import LEASE, Lease
from jaxgrad.results.urls import NOT_IN_URLS, URL, is_url, local_path

# Scheme -> package, and the extra of jaxgrad that installs it.
_LIBRARIES = {
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
}
# `ObjectStorage.exists` lists a folder again when its listing is older than this.
LISTING_SECONDS = 2.0
_PROBE = ".run.json.probe-{}.tmp"


class LocalStorage:
    """D as a local folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None

    def describe(self, name: str = "") -> str:
        """A file's path, or D's, for messages."""
        return str(self.path / name)

    def is_there(self) -> bool:
        """Whether D exists."""
        return self.path.is_dir()

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""
        try:
            return names_in(self.path / folder)
        except OSError as error:
            raise OutputError(f"Cannot read {self.describe(folder)}: {error.strerror}.") from error

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: There is no such file.
            OutputError: It cannot be read.
        """
        try:
            return (self.path / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(name) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OutputError(f"Cannot read {self.describe(name)}: {error.strerror}.") from error

    def file(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to write. It appears when the block ends without an error."""
        self._check_lease()
        return atomic_file(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file. Once this returns, no kill can lose it."""
        with self.file(name) as file:
            file.write(data)

    def move(self, name: str, target: str) -> None:
        """Moves a file to another name."""
        self._check_lease()
        move_file(self.path / name, self.path / target)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files. A file that is gone already is no error."""
        self._check_lease()
        remove_files(self.path / name for name in names)

    def make_folders(self, folders: Iterable[str] = ()) -> None:
        """Makes D, and folders in it."""
        try:
            os.makedirs(self.path, exist_ok=True)
            folders = list(folders)
            for folder in folders:
                os.makedirs(self.path / folder, exist_ok=True)
            if folders:
                sync_folder(self.path)
        except OSError as error:
            raise write_error(self.path, error) from error

    def remove_folder(self, folder: str) -> None:
        """Removes a folder if it is empty."""
        try:
            os.rmdir(self.path / folder)
            sync_folder(self.path)
        except OSError as error:
            # It is gone since an earlier attempt, or a file that is not ours is in it.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise write_error(self.path, error) from error

    def clean(self, folders: Iterable[str]) -> None:
        """Removes files that killed processes left half written in D and its folders."""
        for folder in ("", *folders):
            remove_files(temporaries_in(self.path / folder))

    def probe(self) -> None:
        """Tests that D can be made and written; raises OutputError if not."""
        probe_folder(self.path)

    def lock(self) -> None:
        """Keeps other processes from writing D. A process may lock it twice."""
        try:
            if lock_folder(self.path) or self._lease is not None:
                return
            lease_path = str(self.path.absolute() / LEASE)
            lease = Lease(fsspec.filesystem("file"), lease_path, self.describe())
            self._lease = _acquired(lease, self)
        except OSError as error:
            raise write_error(self.path, error) from error

    def unlock(self) -> None:
        """Unlocks D; harmless if it is not locked."""
        unlock_folder(self.path)
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _check_lease(self) -> None:
        if self._lease is not None:
            try:
                self._lease.check()
            except OSError as error:
                raise write_error(self.path / LEASE, error) from error


class ObjectStorage:
    """D in an object store.

    Args:
        url: D's.

    Raises:
        UserError: The URL cannot be used, or the library for it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        match = URL.fullmatch(self.url)
        if match is None or NOT_IN_URLS.search(match[2]):
            raise UserError(
                f"{url} cannot be used: give SCHEME://BUCKET/FOLDER, in plain characters "
                "(none of * ? [ ] # % and no empty part)."
            )
        self._file_system, self._root = _connect(self.url, match[1])
        self._lease: Lease | None = None
        self._listings: dict[str, tuple[float, set[str]]] = {}

    def describe(self, name: str = "") -> str:
        """An object's URL, or D's, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def is_there(self) -> bool:
        """Whether anything is in D: an object store has no empty folders."""
        return bool(self.names())

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""
        parent = self._path(folder)
        with self._user_errors("read", folder):
            # Other processes write here, too.
            self._file_system.invalidate_cache()
            try:
                found = self._file_system.ls(parent, detail=False)
            except FileNotFoundError:
                found = []
        pairs = (path.rstrip("/").rpartition("/") for path in found)
        names = sorted(name for above, _, name in pairs if above == parent and name)
        self._listings[folder] = time.monotonic(), set(names)
        return names

    def exists(self, name: str) -> bool:
        """Whether an object is there. One that another process wrote may show up 2 s late."""
        folder, _, base = name.rpartition("/")
        when, known = self._listings.get(folder, (-LISTING_SECONDS, set()))
        if time.monotonic() - when > LISTING_SECONDS:
            known = set(self.names(folder))
        return base in known

    def read(self, name: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: There is no such object.
            OutputError: It cannot be read.
        """
        with self._user_errors("read", name):
            return self._file_system.cat_file(self._path(name))

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A file to write. It appears when the block ends without an error."""
        # Not streamed into the store: after an error the first half would stay there as an object.
        try:
            with tempfile.NamedTemporaryFile() as file:
                yield file  # type: ignore[misc]
                file.flush()
                self._check_lease()
                with self._user_errors("write", name):
                    self._file_system.put_file(file.name, self._path(name))
        except OSError as error:
            raise write_error(Path(tempfile.gettempdir()), error) from error
        self._note(name)

    def write(self, name: str, data: bytes) -> None:
        """Writes an object. Once this returns, it is in the store."""
        self._check_lease()
        with self._user_errors("write", name):
            self._file_system.pipe_file(self._path(name), data)
        self._note(name)

    def move(self, name: str, target: str) -> None:
        """Moves an object to another name."""
        # The copy first: a kill between the two leaves both names, not neither.
        self.write(target, self.read(name))
        self.remove([name])

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects. One that is gone already is no error."""
        names = list(names)
        if not names:
            return
        self._check_lease()
        for name in names:
            folder, _, base = name.rpartition("/")
            self._listings.get(folder, (0.0, set()))[1].discard(base)
        with self._user_errors("remove", names[0]):
            try:
                self._file_system.rm([self._path(name) for name in names])
            except FileNotFoundError:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        self._file_system.rm_file(self._path(name))

    def make_folders(self, folders: Iterable[str] = ()) -> None:
        """Does nothing: a folder exists while an object is in it."""

    def remove_folder(self, folder: str) -> None:
        """Does nothing: a folder goes with its last object."""

    def clean(self, folders: Iterable[str]) -> None:
        """Removes what a killed `probe` left. No object is ever half written."""
        self.remove(name for name in self.names() if re.fullmatch(_PROBE.format(r"\w+"), name))

    def probe(self) -> None:
        """Tests that D can be written; raises OutputError if not."""
        name = _PROBE.format(secrets.token_hex(8))
        path = self._path(name)
        with self._user_errors("write", name):
            self._file_system.pipe_file(path, b"")
            self._file_system.rm_file(path)

    def lock(self) -> None:
        """Keeps others from writing D, also in this process."""
        if self._lease is not None:
            return
        lease = Lease(self._file_system, self._path(LEASE), self.url)
        with self._user_errors("write", LEASE):
            self._lease = _acquired(lease, self)

    def unlock(self) -> None:
        """Unlocks D; harmless if it is not locked."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _note(self, name: str) -> None:
        folder, _, base = name.rpartition("/")
        self._listings.get(folder, (0.0, set()))[1].add(base)

    def _check_lease(self) -> None:
        if self._lease is not None:
            with self._user_errors("write", LEASE):
                self._lease.check()

    @contextmanager
    def _user_errors(self, verb: str, name: str) -> Iterator[None]:
        """Turns an error of the store into one line. Each of fsspec's libraries has errors of its own."""
        try:
            yield
        except OutputError:
            raise
        except Exception as error:
            if verb == "read" and isinstance(error, FileNotFoundError):
                raise
            reason = str(error) or type(error).__name__
            raise OutputError(
                f"Cannot {verb} {self.describe(name)}: {reason}. Nothing written before is lost: "
                "mend this and run the same command again."
            ) from error


def _acquired(lease: Lease, owner: object) -> Lease:
    """Acquires a lease. It is released with its owner, or at the end of the process."""
    try:
        lease.acquire()
    except BaseException:
        lease.release()
        raise
    weakref.finalize(owner, lease.release)
    return lease


Storage = LocalStorage | ObjectStorage


def open_storage(directory: str | Path) -> Storage:
    """The storage of a directory. Nothing is made or written.

    Args:
        directory: A path or a URL.

    Raises:
        UserError: The URL cannot be used, or the library for it is not installed.
    """
    return (
        ObjectStorage(str(directory)) if is_url(directory) else LocalStorage(local_path(directory))
    )


def atomic_file_at(location: str | Path) -> AbstractContextManager[BinaryIO]:
    """Opens a file for writing, by path or URL. It appears whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    if not is_url(location):
        return atomic_file(local_path(location))
    directory, _, name = str(location).rpartition("/")
    return open_storage(directory).file(name)


def _connect(url: str, scheme: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    try:
        file_system, root = url_to_fs(url)
    except ImportError as error:
        package, extra = _LIBRARIES.get(scheme.lower(), ("", ""))
        mend = f"pip install {package} (jaxgrad's extra {extra!r})" if package else str(error)
        raise UserError(f"{url} needs a library that is not installed: {mend}.") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}. Give a path, or a URL that fsspec knows.") from error
    except Exception as error:
        raise UserError(f"{url} cannot be opened: {error}.") from error
    return file_system, root.rstrip("/")
