"""What wrote a result: the command, versions, the commit, the machine."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """The command, versions and commit, as run.json has them."""
    packages = [
        "jaxgrad",
        "jax",
        "jaxlib",
        "flax",
        "orbax-checkpoint",
        "transformers",
        "tokenizers",
    ]
    packages.append("numpy")
    return {
        "command": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
