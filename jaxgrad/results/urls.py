"""Directories as users give them: local paths and URLs. A `Path` cannot hold a URL."""

import re
from pathlib import Path, PurePath

import fsspec

from jaxgrad.errors import UserError
from jaxgrad.paths import expanded

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Some of fsspec's calls read these as patterns, versions or chains of file systems.
NOT_IN_URLS = re.compile(r"[*?\[\]#%\x00-\x1f\x7f]|::|//|(^|/)\.{1,2}(/|$)")


def is_url(location: str | Path) -> bool:
    """Whether a location is in an object store. A file:// URL is not."""
    match = None if isinstance(location, PurePath) else URL.match(location)
    return match is not None and match[1].lower() not in ("file", "local")


def local_path(location: str | Path) -> Path:
    """The path of a local location, also of one given as file:///... or with ~ and variables.

    Raises:
        UserError: It is not local, or not an absolute file:// URL.
    """
    if is_url(location):
        raise UserError(
            f"{location} is a URL, but reports and studies are written to a local disk: give a path. "
            "(bin/analyze writes runs to URLs, bin/report and bin/export read them.)"
        )
    match = None if isinstance(location, PurePath) else URL.match(location)
    if match is None:
        _refuse_broken_url(location)
        return Path(expanded(str(location)))
    if not match[2].startswith("/"):
        raise UserError(
            f"{location} names no local path: write file:///folder, with three slashes."
        )
    return Path(match[2])


def _refuse_broken_url(location: str | Path) -> None:
    if "://" in str(location):
        raise UserError(
            f"{location} is neither a path nor a URL of the form SCHEME://BUCKET/FOLDER."
        )
    # Path("gs://bucket/x") is "gs:/bucket/x". It would be made as a folder named "gs:".
    scheme, colon, rest = str(location).partition(":/")
    if colon and not rest.startswith("/") and scheme in fsspec.available_protocols():
        raise UserError(
            f"{location} is a URL that lost a slash, which happens when a URL becomes a Path: give it "
            "as a string, SCHEME://BUCKET/FOLDER."
        )


def path_below(directory: str | Path, *names: str) -> str:
    """The path or URL of a file or folder inside a directory.

    Args:
        directory: A path or a URL.
        names: Of folders and a file, from the outside in.

    Raises:
        UserError: A name leads out of the directory, or an object store may not take it.
    """
    url = is_url(directory)
    for name in names:
        odd = name in ("", ".", "..") or "/" in name or not name.isprintable()
        if odd or (url and NOT_IN_URLS.search(name)):
            raise UserError(f"No directory can be named {name!r} in {directory}: rename the file.")
    if url:
        return "/".join((str(directory).rstrip("/"), *names))
    return str(local_path(directory).joinpath(*names))
