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


def use_huge_pages() -> None:
    """Go on with glibc's allocator on huge pages, which it reads at the start of a process alone.

    XLA takes new memory for every batch and reads all weights twice: with pages of 4 KB a fifth of the
    time of a short example goes into page faults and look-ups (BUILD_NOTES.md). Other systems ignore it.
    Nothing happens where this is imported into another program, which a new start would lose.
    """
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    is_ours = main.resolve().parent in (ROOT / "bin", ROOT / "benchmarks")
    if is_ours and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


use_project_environment()
use_huge_pages()
