"""Compiled programs: counted, bounded, and alone on their cores."""

import scipy.linalg
from threadpoolctl import threadpool_info

from jaxgrad import program
from jaxgrad.batches import BatchShape
from jaxgrad.gradients import select_parameters
from jaxgrad.measure import MeasureSettings
from jaxgrad.models import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.decoder import num_parameters

CONFIG = DecoderConfig(
    vocab_size=31,
    width=10,
    mlp_width=14,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=6,
    max_positions=64,
    activation="silu",
    norm_epsilon=1e-5,
    kinds=(AttentionKind(Rope(10000.0)),),
    layer_kinds=(0, 0),
    tied_embeddings=True,
)


def make_programs():
    return program.Programs(CONFIG, "float32", MeasureSettings(select_parameters(CONFIG, "q_proj")))


def blas_threads():
    """Threads of each OpenBLAS in the process, by file."""
    entries = [entry for entry in threadpool_info() if entry["user_api"] == "blas"]
    return {entry["filepath"]: entry["num_threads"] for entry in entries}


def test_lapack_of_scipy_runs_on_one_thread_inside_a_measurement():
    assert scipy.linalg is not None
    before = blas_threads()
    with program._single_threaded_blas():
        threads = blas_threads()
    assert any("scipy" in path for path in threads), threads
    assert set(threads.values()) == {1}
    assert blas_threads() == before


def test_the_limit_holds_until_the_last_of_two_threads_has_left():
    before = blas_threads()
    first, second = program._single_threaded_blas(), program._single_threaded_blas()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(blas_threads().values()) == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before


def test_a_shape_is_compiled_once_and_counted():
    programs = make_programs()
    small, large = BatchShape(1, 8, 4), BatchShape(1, 16, 4)
    assert programs.tally.shapes == 0
    assert programs.compiled(small) is programs.compiled(small)
    programs.compiled(large)
    assert programs.tally.shapes == 2
    assert programs.tally.seconds > 0


def test_the_memory_plan_counts_weights_exactly_and_grows_with_the_batch():
    programs = make_programs()
    small, large = (programs.memory(BatchShape(1, T, 4)) for T in (8, 64))
    assert small.weights == large.weights == num_parameters(CONFIG) * 4
    assert 0 < small.work_space < large.work_space
    assert large.total == large.weights + large.work_space
