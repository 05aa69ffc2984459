"""Output directories as paths and as URLs, which no `Path` can stand for."""

import re
from pathlib import Path, PurePath

import fsspec

from jaxgrad.errors import UserError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Some of fsspec's calls take these for patterns, versions or chains of file systems.
NOT_IN_URLS = re.compile(r"[*?\[\]#%\x00-\x1f\x7f]|::|//|(^|/)\.{1,2}(/|$)")


def is_url(place: str | Path) -> bool:
    """Whether a place is one of an object store, so that no `Path` can stand for it."""
    match = None if isinstance(place, PurePath) else URL.match(place)
    return match is not None and match[1].lower() not in ("file", "local")


def local_path(place: str | Path) -> Path:
    """The path of a local place, also of one given as file:///...

    Raises:
        UserError: It is not local, or not an absolute file:// URL.
    """
    if is_url(place):
        raise UserError(
            f"{place} is a URL, but reports, and the studies they are of, are written to a local disk: "
            "give a path. (bin/analyze writes runs to URLs, bin/report and bin/export read them.)"
        )
    match = None if isinstance(place, PurePath) else URL.match(place)
    if match is None:
        _refuse_broken_url(place)
        return Path(place)
    if not match[2].startswith("/"):
        raise UserError(f"{place} names no local path: write file:///folder, with three slashes.")
    return Path(match[2])


def _refuse_broken_url(place: str | Path) -> None:
    if "://" in str(place):
        raise UserError(f"{place} is neither a path nor a URL of the form SCHEME://BUCKET/FOLDER.")
    # Path("gs://bucket/x") is "gs:/bucket/x", and would be made as a folder named "gs:".
    scheme, colon, rest = str(place).partition(":/")
    if colon and not rest.startswith("/") and scheme in fsspec.available_protocols():
        raise UserError(
            f"{place} is a URL that lost a slash, as one does that is made a Path: give it as a text, "
            "SCHEME://BUCKET/FOLDER."
        )


def place_below(place: str | Path, *names: str) -> str:
    """A place inside another one.

    Args:
        place: A path or a URL.
        names: Of a folder or file each, one below the other.

    Raises:
        UserError: A name that would lead out of the place, or that an object store may not take.
    """
    url = is_url(place)
    for name in names:
        odd = name in ("", ".", "..") or "/" in name or not name.isprintable()
        if odd or (url and NOT_IN_URLS.search(name)):
            raise UserError(f"No directory can be named {name!r} in {place}: rename the file.")
    if url:
        return "/".join((str(place).rstrip("/"), *names))
    return str(local_path(place).joinpath(*names))
