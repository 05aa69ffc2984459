"""Writing to a local disk so that a kill or a full disk at any moment leaves whole files only."""

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

# Pandas and Arrow pass over names that start with a dot when they read a folder of parts.
_TEMPORARY = re.compile(r"\..+\.tmp")

# The locks this process holds, by real path. A lock belongs to the process and not to an object, so
# that a run which failed in a notebook can be opened again there.
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
    return OutputError(f"Cannot write {path}: {reason}. Choose a place that can be written.")


def temporary_path(path: Path) -> Path:
    """The name under which a file is written before it gets its own; each process has one of its own."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries (names made, replaced and removed) to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network file systems cannot flush a folder; there is nothing better to do there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name whole and on the disk, or not at all.

    Raises:
        OutputError: It cannot be written; a full disk has its own line.
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
    """Removes files, then flushes their folders; one that is gone already is no error.

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
    """Moves a file to another folder of its file system, which is made where it is missing.

    Raises:
        OutputError: It cannot be moved.
    """
    try:
        os.makedirs(target.parent, exist_ok=True)
        os.replace(source, target)
        # The new name first: a kill in between leaves both, not neither.
        sync_folder(target.parent)
        sync_folder(source.parent)
    except OSError as error:
        raise write_error(target, error) from error


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none when there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def temporaries_in(folder: Path) -> list[Path]:
    """What a killed process left half written in a folder."""
    return [folder / name for name in names_in(folder) if _TEMPORARY.fullmatch(name)]


def probe_folder(path: Path) -> None:
    """Tests that files can be written in a folder, or in the parent it would be made in.

    Raises:
        OutputError: They cannot.
    """
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        # Without a name where the system can: a kill in here leaves nothing.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise write_error(path, error) from error


def lock_folder(path: Path) -> bool:
    """Keeps other processes from writing a folder until `unlock_folder` or the process's end.

    Returns:
        Whether the file system can lock a folder; some network file systems cannot.

    Raises:
        OutputError: Another process holds it.
    """
    name = os.path.realpath(path)
    if name in _locks:
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
    _locks[name] = folder
    return True


def unlock_folder(path: Path) -> None:
    """Gives a folder free; harmless when it is not locked."""
    folder = _locks.pop(os.path.realpath(path), None)
    if folder is not None:
        os.close(folder)
