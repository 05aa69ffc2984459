"""Compiled programs: counted, bounded, and alone on their cores."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from decoder_configs import tiny_config
from threadpoolctl import threadpool_info, threadpool_limits

from jaxgrad.data.batches import BatchShape, ExampleArrays
from jaxgrad.errors import UserError
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure import blas
from jaxgrad.measure import programs as program
from jaxgrad.models.decoder import abstract_decoder, num_parameters
from jaxgrad.options import MeasureSettings

CONFIG = tiny_config(num_layers=2, tied_embeddings=True)


def make_programs(**settings):
    asked = MeasureSettings(select_parameters(CONFIG, "q_proj"), **settings)
    return program.Programs(CONFIG, "float32", asked)


def blas_threads():
    """Threads of each OpenBLAS in the process, by file."""
    entries = [entry for entry in threadpool_info() if entry["user_api"] == "blas"]
    return {entry["filepath"]: entry["num_threads"] for entry in entries}


@pytest.fixture
def two_blas_threads():
    """conftest.py leaves one. Set by the thread that sets them in a run: others are not obeyed."""
    keeper = blas._blas_keeper
    limits = keeper.submit(threadpool_limits, 2, user_api="blas").result()
    assert set(blas_threads().values()) == {2}
    yield
    keeper.submit(limits.restore_original_limits).result()


def test_lapack_of_scipy_runs_on_one_thread_inside_a_measurement(two_blas_threads):
    assert scipy.linalg is not None
    before = blas_threads()
    with blas.single_threaded_blas():
        threads = blas_threads()
    assert any("scipy" in path for path in threads), threads
    assert set(threads.values()) == {1}
    assert blas_threads() == before


def test_the_limit_holds_until_the_last_of_two_threads_has_left(two_blas_threads):
    """In threads that live on: threadpoolctl obeys only the first one that set a limit."""
    before = blas_threads()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for _ in range(2):
            first, second = blas.single_threaded_blas(), blas.single_threaded_blas()
            one.submit(first.__enter__).result()
            assert set(blas_threads().values()) == {1}
            other.submit(second.__enter__).result()
            one.submit(first.__exit__, None, None, None).result()
            assert set(blas_threads().values()) == {1}
            other.submit(second.__exit__, None, None, None).result()
            assert blas_threads() == before
            one, other = other, one


def test_a_limit_that_cannot_be_set_is_told(monkeypatch):
    class Deaf:
        def limit(self, **_):
            return contextlib.nullcontext()

        def info(self):
            return [{"user_api": "blas", "num_threads": 2}]

    monkeypatch.setattr(blas, "ThreadpoolController", Deaf)
    with (
        pytest.warns(RuntimeWarning, match="keeps several threads"),
        blas.single_threaded_blas(),
    ):
        pass


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
    # On a CPU two batches are in flight.
    assert large.total == large.weights + 2 * large.work_space


def batch_of(lengths):
    """Rows of these many tokens (0: padding), 8 at most, the last four of each its response."""
    B = len(lengths)
    arrays = ExampleArrays(
        np.zeros((B, 8), np.int32),
        np.zeros((B, 4), np.int32),
        np.zeros((B, 4), np.int32),
        np.zeros((B, 4)),
    )
    for row, length in enumerate(lengths):
        if length:
            arrays.tokens_T[row, :length] = np.arange(1, length + 1) + row
            arrays.positions_S[row] = np.arange(length - 5, length - 1)
            arrays.labels_S[row] = arrays.tokens_T[row, length - 4 : length]
            arrays.weights_S[row] = 1 / 4
    return arrays


def random_state():
    with jax.enable_x64(True):
        _, state = abstract_decoder(CONFIG, "float32")
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape).astype(np.float32) / 3), state
    )


@pytest.mark.parametrize("where", ["running", "compiling"])
def test_a_batch_too_large_for_the_memory_is_measured_in_parts(monkeypatch, where):
    """Room for two examples: 5 are measured as 3 + 2, and 3 as 2 + 1; refused once a size."""
    state, lengths = random_state(), [8, 7, 8, 6, 0]
    arrays, shape = batch_of(lengths), BatchShape(5, 8, 4)
    loss_B, whole = make_programs().measure(state, shape, arrays)
    programs, original, refused = make_programs(), program.Programs.compiled, []

    def exhausted(shape):
        refused.append(shape.num_examples)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def compiled(self, shape):
        if shape.num_examples <= 2:
            return original(self, shape)
        return exhausted(shape) if where == "compiling" else lambda *_: exhausted(shape)

    monkeypatch.setattr(program.Programs, "compiled", compiled)
    for _ in range(2):
        loss_P, parts = programs.measure(state, shape, arrays)
        assert len(loss_P) >= 4  # the last row is padding
        np.testing.assert_allclose(loss_P[:4], loss_B[:4], rtol=1e-6)
        assert parts["q"].keys() == whole["q"].keys()
        for name, theirs in whole["q"].items():
            np.testing.assert_allclose(parts["q"][name][:4], theirs[:4], rtol=1e-4, atol=1e-7)
    assert refused == [5, 3]
    assert [small.num_examples for small in programs.halves.values()] == [3, 2]
    if where == "compiling":
        assert make_programs().memory(shape).shape.num_examples == 2


def test_a_program_beyond_the_memory_by_xlas_account_never_runs(monkeypatch):
    state, arrays, shape = random_state(), batch_of([8, 7, 8, 6]), BatchShape(4, 8, 4)
    loss_B, _ = make_programs().measure(state, shape, arrays)
    limit = make_programs(backend="gpu").memory(BatchShape(2, 8, 4)).total
    monkeypatch.setattr(program, "memory_at_hand", lambda: limit)
    programs = make_programs(backend="gpu")
    loss_P, _ = programs.measure(state, shape, arrays)
    np.testing.assert_allclose(loss_P, loss_B, rtol=1e-6)
    assert programs.halves == {shape: programs.memory(shape).shape}
    assert programs.memory(shape).total <= limit


def test_one_example_too_large_for_the_memory_is_an_error_that_says_what_to_do(monkeypatch):
    programs = make_programs()

    def compiled(self, shape):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(program.Programs, "compiled", compiled)
    for call in (
        lambda shape: programs.measure(random_state(), shape, batch_of([8, 8])),
        programs.memory,
    ):
        with pytest.raises(UserError, match=r"one example of 8 tokens.*--max_length.*--dtype"):
            call(BatchShape(2, 8, 4))


def test_other_errors_of_the_device_are_not_swallowed(monkeypatch):
    def compiled(self, shape):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(program.Programs, "compiled", compiled)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        make_programs().measure(random_state(), BatchShape(2, 8, 4), batch_of([8, 8]))
