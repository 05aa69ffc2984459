"""Data sets of the Hugging Face hub, through the library `datasets`: its cache and offline mode hold.

`datasets` 4 and later run no code of a repository. It is imported only here, because that takes seconds.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jaxgrad.errors import UserError

HUB_MARK = "hf:"
_NAME = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[^:[]+))?(:(?P<split>[^:[]+))?"
)
_FORM = "write hf:ORG/NAME:SPLIT or hf:ORG/NAME:CONFIG:SPLIT"


@dataclass(frozen=True)
class HubSlice:
    """Records of a split.

    Attributes:
        num_records: Of the whole split.
        names: Of all its columns.
        num_rows: Of the slice.
        table: The slice's columns that are needed.
    """

    num_records: int
    names: list[str]
    num_rows: int
    table: pa.Table


def read_hub_set(name: str, needed: Collection[str], start: int, limit: int | None) -> HubSlice:
    """Records `start` to `start + limit` of a set.

    Args:
        name: hf:ORG/NAME:SPLIT, hf:ORG/NAME:CONFIG:SPLIT; behind NAME there may be @REVISION.
        needed: Names of the columns whose values are needed.
        start: First record, from 0.
        limit: How many at most; None for all that follow.

    Raises:
        UserError: The name is not of this form, or the set cannot be had.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UserError(
            f"--data_path={name} names no set of the hub; {_FORM}, and a part of it by --start and --limit"
        )
    repo, revision, split = parts["repo"], parts["revision"], parts["split"]
    config = parts["config"]
    if split is None:
        split, config = config, None
    if Path(repo).is_dir():
        raise UserError(
            f"--data_path={name}: a directory {repo} is here, and the library datasets would read that; "
            "give the directory, or start the command elsewhere"
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data_path={name} needs the package datasets ({error}); pip install datasets"
        ) from error
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        if split is None:
            names = datasets.get_dataset_split_names(repo, config, revision=revision)
            raise UserError(
                f"--data_path={name} names no split; it has {', '.join(names)}: {_FORM}"
            )
        found: Any = datasets.load_dataset(repo, config, split=split, revision=revision)
        return _slice(found, needed, start, limit)
    except UserError:
        raise
    except Exception as error:  # of the network, the hub, the files of strangers: anything
        raise _refusal(name, error, datasets.config.HF_HUB_OFFLINE) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _slice(found: Any, needed: Collection[str], start: int, limit: int | None) -> HubSlice:
    columns = [column for column in found.column_names if column in needed]
    stop = len(found) if limit is None else min(start + limit, len(found))
    num_rows = max(stop - start, 0)
    table = pa.table({})
    if columns and num_rows:
        table = found.select_columns(columns).with_format("arrow")[start:stop]
    return HubSlice(len(found), found.column_names, num_rows, table)


def _refusal(name: str, error: Exception, offline: bool) -> UserError:
    detail = " ".join(str(error).split())[:600] or type(error).__name__
    hint = "; it is offline (HF_HUB_OFFLINE), and only what is in its cache can be had" * offline
    return UserError(
        f"--data_path={name}: datasets cannot give it ({type(error).__name__}: {detail}){hint}; {_FORM}"
    )
