"""Find the interpreter that jaxgrad is installed in, so that `bin/NAME` works as it stands."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def use_project_environment() -> None:
    """Go on under the checkout's .venv when this interpreter has no jaxgrad; one line if none has."""
    if importlib.util.find_spec("jaxgrad") and importlib.util.find_spec("jax"):
        return
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(python, [str(python), *sys.argv])
    sys.exit("error: jaxgrad is not installed here: run bin/demo once, or `pip install .`")


use_project_environment()
