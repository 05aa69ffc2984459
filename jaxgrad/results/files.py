"""Files on a local disk. A kill or a full disk at any moment leaves whole files only."""

import errno
import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from jaxgrad.errors import OutputError

# Pandas and Arrow skip names that start with a dot when they read a folder of parts.
_TEMPORARY = re.compile(r"\..+\.tmp")

# Folders that this process has locked: real path -> open descriptor. The process owns a lock, not an
# object: a run that failed in a notebook can be opened again there.
_locks: dict[str, int] = {}


def write_error(path: Path, error: OSError) -> OutputError:
    """The user's line for a file or folder that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {path} could not be written. Nothing written before is lost: "
            "free some space and run the same command again."
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = "a file is in the way"
    else:
        reason = error.strerror or str(error)
    return OutputError(f"Cannot write {path}: {reason}. Choose a directory that can be written.")


def temporary_path(path: Path) -> Path:
    """Where a file is written before it gets its own name; differs from process to process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries (names made, replaced and removed) to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network file systems cannot flush a folder. Nothing better can be done there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing. It appears under its name whole and flushed, or not at all.

    Raises:
        OutputError: It cannot be written. A full disk has a message of its own.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def remove_files(files: Iterable[Path]) -> None:
    """Removes files, then flushes their folders. A file that is gone already is no error.

    Raises:
        OutputError: One cannot be removed.
    """
    folders = set()
    for file in files:
        folders.add(file.parent)
        try:
            os.unlink(file)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise write_error(file, error) from error
    for folder in folders:
        try:
            sync_folder(folder)
        except OSError as error:
            raise write_error(folder, error) from error


def move_file(source: Path, target: Path) -> None:
    """Moves a file to another folder of its file system; makes that folder if it is missing.

    Raises:
        OutputError: It cannot be moved.
    """
    try:
        os.makedirs(target.parent, exist_ok=True)
        os.replace(source, target)
        # The new name first: a kill between the two leaves both names, not neither.
        sync_folder(target.parent)
        sync_folder(source.parent)
    except OSError as error:
        raise write_error(target, error) from error


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def temporaries_in(folder: Path) -> list[Path]:
    """The files in a folder that a killed process left half written."""
    return [folder / name for name in names_in(folder) if _TEMPORARY.fullmatch(name)]


def probe_folder(path: Path) -> None:
    """Tests that files can be written in a folder, or in the parent it would be made in.

    Raises:
        OutputError: They cannot.
    """
    existing = path.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        # The file has no name if the system can do that: a kill in here leaves nothing.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise write_error(path, error) from error


def lock_folder(path: Path) -> bool:
    """Keeps other processes from writing a folder, until `unlock_folder` or the end of this process.

    Returns:
        Whether the file system can lock a folder. Some network file systems cannot.

    Raises:
        OutputError: Another process has locked it.
    """
    real_path = os.path.realpath(path)
    if real_path in _locks:
        return True
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise OutputError(
            f"Another process is writing {path}. Wait for it, or give another --output_dir."
        ) from error
    except OSError:
        os.close(folder)
        return False
    _locks[real_path] = folder
    return True


def unlock_folder(path: Path) -> None:
    """Unlocks a folder; harmless if it is not locked."""
    folder = _locks.pop(os.path.realpath(path), None)
    if folder is not None:
        os.close(folder)
