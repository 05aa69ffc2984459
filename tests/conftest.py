import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Strictness for every test: a silent promotion or broadcast is an error. Before JAX is imported.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes run the tests on two cores. More threads only wait for each other, which takes time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Nearly all of the tests' time is compiling, and most of that is optimizing. `XLA_FLAGS= bin/test` has all
# tests on the compiler that users have; `shipped_compiler` has single ones on it.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
# One cache of programs for all processes of these tests. It is empty at the beginning.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxgrad-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest

# What `bin/test --fast` leaves out: modules, and single tests of others, that compile whole models, start
# processes, drive a browser, draw whole reports or repeat an experiment many times.
WHOLE_MODULES = {
    "test_accelerators",
    "test_adapters",
    "test_authors_similarity",
    "test_bad_input",
    "test_benchmarks",
    "test_compile_only",
    "test_convert",
    "test_decoder",
    "test_docs",
    "test_dry_run",
    "test_extending",
    "test_families",
    "test_family_weights",
    "test_first_not_finite",
    "test_full_disk",
    "test_gguf",
    "test_layerwise",
    "test_loss",
    "test_older_runs",
    "test_parity",
    "test_pipeline",
    "test_prefixes",
    "test_processes",
    "test_program",
    "test_report_build",
    "test_report_figures",
    "test_report_page",
    "test_report_page_file",
    "test_sharding",
    "test_soak",
    "test_spectra_real",
    "test_stopping",
    "test_study",
}
WHOLE_TESTS = {
    "test_analysis_intervals::test_coverage",
    "test_analysis_intervals::test_coverage_of_a_difference_of_mad",
    "test_analysis_intervals::test_percentile_and_bca_of_mad_miss_the_truth",
    "test_chat_templates::test_a_run_goes_on_with_the_date_that_it_began_with",
    "test_conversations::test_targets_with_gaps_are_measured_as_in_pytorch",
    "test_exchange::test_three_real_processes",
    "test_memory::test_the_prediction_is_within_20_percent_of_xlas_account",
    "test_similarity::test_an_analysis_gives_pytorch_s_cosines",
    "test_revision::test_a_run_records_the_commit",
    "test_report_statistics::test_more_statistics_are_compared_drawn_and_on_the_page",
}
# The files that take longest, from the longest on. They begin first.
LONGEST = (
    "test_processes",
    "test_parity",
    "test_pipeline",
    "test_spectra_real",
    "test_families",
    "test_sharding",
    "test_analysis_intervals",
    "test_spectra",
    "test_layerwise",
    "test_loss",
    "test_convert",
    "test_soak",
)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="unit tests only (conftest.py)")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--fast") and collection_path.stem in WHOLE_MODULES:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    # A file stays in one process, so one that takes long and begins last would leave the others idle.
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))
    if not config.getoption("--fast"):
        return
    names = {
        item: f"{item.path.stem}::{getattr(item, 'originalname', item.name)}" for item in items
    }
    dropped = [item for item in items if names[item] in WHOLE_TESTS]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if names[item] not in WHOLE_TESTS]


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
def shipped_compiler(monkeypatch):
    """XLA as users have it: programs that are compiled ahead of time in this process are optimized."""
    import jax

    compile_lowered = jax.stages.Lowered.compile
    shipped = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda lowered: compile_lowered(lowered, shipped)
    )


@pytest.fixture
def unsynced():
    """No waiting for the disk, where its caches cannot matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield
