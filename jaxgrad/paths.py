"""Paths as users write them: with ~, with environment variables, several in one flag."""

import os
import re
from pathlib import Path

from jaxgrad.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_COMMA = re.compile(r"(?<!\\),")


def expanded(text: str) -> str:
    r"""A path or URL with `~`, `~user`, `$NAME` and `${NAME}` replaced by what they stand for.

    A path that exists as it is written stays as it is, and so does one that no file can have.

    Raises:
        UserError: A variable is not set.
    """
    if not ("~" in text or "$" in text) or "\0" in text or os.path.lexists(text):
        return text
    for braced, plain in _VARIABLE.findall(text):
        if not os.environ.get(braced or plain):
            raise UserError(
                f"the environment variable {braced or plain} is not set ({text} needs it)"
            )
    text = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    return os.path.expanduser(text)


def split_paths(text: str) -> list[str]:
    r"""The paths in a flag that takes several: A,B. A comma of a file's name is written `\,`.

    Raises:
        UserError: The text is one file's name, and the list of several, too.
    """
    parts = [part.replace("\\,", ",") for part in _COMMA.split(text)]
    if len(parts) == 1 or not Path(expanded(text)).exists():
        return parts
    if all(Path(expanded(part)).exists() for part in parts):
        raise UserError(
            f"{text} is a file, and {' and '.join(parts)} are files: "
            rf"write \, for a comma that belongs to a name"
        )
    return [text]
