#!/usr/bin/env python3
"""Renews the list of config attributes that transformers reads, `families/read_by_transformers.json`.

    pip download --no-deps -d wheels transformers==4.40.2
    ...                                      one for each version that is to count
    .venv/bin/python docs/config_reads.py wheels/*.whl

It searches the source in the wheels (see `jaxgrad.models.families.transformers_source`); nothing of them
is run. The model types are those of `FAMILIES`, so a new family needs no more than this command. An
attribute that any of the versions reads counts as read.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxgrad.models.families import FAMILIES  # noqa: E402
from jaxgrad.models.families.reads import FILE, merge_reads  # noqa: E402
from jaxgrad.models.families.transformers_source import read_source  # noqa: E402


def reads_of_wheels(wheels: list[Path]) -> dict[str, Any]:
    """The content of the file.

    Args:
        wheels: files named `transformers-VERSION-...whl`.
    """
    by_version = {}
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        if name != "transformers":
            raise SystemExit(f"{wheel} is not a wheel of transformers")
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".py")])
            found = {kind: read_source(Path(folder) / "transformers", kind) for kind in FAMILIES}
        by_version[version] = {kind: reads for kind, reads in found.items() if reads is not None}
    return merge_reads(by_version)


def main() -> int:
    """Write the file."""
    if len(sys.argv) < 2:
        raise SystemExit("give the wheels, see the first lines of this file")
    content = reads_of_wheels([Path(argument) for argument in sys.argv[1:]])
    # A line for each name, so that a new version's differences can be read.
    FILE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}: transformers {', '.join(content['versions'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
