import os
from pathlib import Path

# Strictness for every test: a silent promotion or broadcast is an error. Before JAX is imported.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

TESTS = Path(__file__).resolve().parent
# What `bin/test --fast` leaves out: modules that compile whole models, start processes, drive a browser,
# or draw whole reports. A module with such tests only in part is split.
WHOLE = (
    "test_authors_similarity",
    "test_bad_input",
    "test_benchmarks",
)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only the modules of unit tests")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--fast") and collection_path.stem in WHOLE:
        return True
    return None


def pytest_configure(config):
    unknown = [name for name in WHOLE if not (TESTS / f"{name}.py").is_file()]
    if unknown:
        raise pytest.UsageError(f"conftest.py: WHOLE names no module: {unknown}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the authors' data; skips, with the reason, where it is not there."""
    shared = Path(os.environ.get("JAXGRAD_SHARED", "../shared"))
    folder = shared / "data" / "layer_gradient"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set JAXGRAD_SHARED to the shared data")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run of `result_runs` that nothing disturbed."""
    from result_runs import complete

    path = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(path)
    return path


@pytest.fixture
def unsynced():
    """No waiting for the disk, where its caches cannot matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield
