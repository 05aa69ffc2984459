"""Statistics against values that are known by construction, for every algorithm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.results import columns
from jaxgrad.spectra import (
    FINITE_FLAGS,
    choose_algorithm,
    extremes_of_factors,
    extremes_of_matrix,
    linalg,
    prepare_factors,
    prepare_matrix,
    spectra_of_factors,
    spectra_of_matrix,
    with_jacobi_values,
)
from jaxgrad.spectra.linalg import (
    cholesky_factor,
    singular_values,
    symmetric_eigenvalues,
    triangular_factor,
)
from jaxgrad.spectra.products import congruent, gram_matrix, upper_product
from jaxgrad.spectra.statistics import scale_to_one

ALGORITHMS = ("qr", "gram", "build", "build_gram", "jacobi")
# Two correct float32 programs differ by 1e-5 in the norms and 1e-4 in the effective rank.
RTOL = {np.float32: 1e-5, np.float64: 1e-10}
RANK_RTOL = {np.float32: 1e-4, np.float64: 1e-9}
# A Gram matrix squares: values below 1e-8 of the largest are noise even in float64.
GRAM_RTOL = {np.float32: 1e-5, np.float64: 1e-7}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def orthonormal(rng, rows, cols):
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def factors_with(sigma, num_tokens, num_out, num_in, rng):
    """X [T, I] and D [T, O] with D^T X = U diag(sigma) V^T."""
    rank = len(sigma)
    left, right = orthonormal(rng, num_out, rank), orthonormal(rng, num_in, rank)
    tokens = orthonormal(rng, num_tokens, rank)
    split = np.sqrt(sigma)
    return (tokens * split) @ right.T, (tokens * split) @ left.T


def statistics_of(x_TI, d_TO, algorithm):
    """Column or finite flag -> its number, for one gradient D^T X."""
    factors = prepare_factors(jnp.asarray(x_TI), {"q": jnp.asarray(d_TO)}, {"q": algorithm})
    (factors,) = with_jacobi_values([factors])
    parts = (spectra_of_factors(factors), extremes_of_factors(factors), factors.finite_flags)
    return {name: np.asarray(value) for part in parts for name, value in part["q"].items()}


def matrix_statistics(matrix_OI, x_TI, d_TO):
    """The same from the gradient matrix."""
    matrix, flags = prepare_matrix(*map(jnp.asarray, (matrix_OI, x_TI, d_TO)))
    found = spectra_of_matrix(matrix) | extremes_of_matrix(matrix) | flags
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [*((way, np.float32) for way in ALGORITHMS), *((way, np.float64) for way in ALGORITHMS[:4])],
)
@pytest.mark.parametrize(
    ("num_tokens", "num_out", "num_in"), [(7, 13, 17), (11, 5, 17), (19, 13, 7), (23, 11, 11)]
)
def test_every_statistic_of_a_known_spectrum(algorithm, dtype, num_tokens, num_out, num_in):
    rng = np.random.default_rng(num_tokens)
    rank = min(num_tokens, num_out, num_in)
    sigma = np.geomspace(3.0, 1e-2, rank)
    x, d = factors_with(sigma, num_tokens, num_out, num_in, rng)
    got = statistics_of(x.astype(dtype), d.astype(dtype), algorithm)
    matrix = d.T @ x
    share = sigma / sigma.sum()
    rtol = (GRAM_RTOL if "gram" in algorithm else RTOL)[dtype]
    np.testing.assert_allclose(got["nuclear_norm"], sigma.sum(), rtol=rtol)
    np.testing.assert_allclose(got["sigma_max"], sigma[0], rtol=rtol)
    np.testing.assert_allclose(got["frobenius_norm"], np.sqrt((sigma**2).sum()), rtol=rtol)
    np.testing.assert_allclose(got["singular_values"], sigma, rtol=1e3 * rtol)
    np.testing.assert_allclose(
        got["effective_rank"], np.exp(-(share * np.log(share)).sum()), rtol=RANK_RTOL[dtype]
    )
    np.testing.assert_allclose(got["stable_rank"], (sigma**2).sum() / sigma[0] ** 2, rtol=rtol)
    np.testing.assert_allclose(got["condition_number"], sigma[0] / sigma[-1], rtol=1e3 * rtol)
    np.testing.assert_allclose(got["entry_mean"], matrix.mean(), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(got["entry_max"], matrix.max(), rtol=rtol)
    np.testing.assert_allclose(got["entry_min"], matrix.min(), rtol=rtol)
    full = rank == min(num_out, num_in)
    np.testing.assert_allclose(got["sigma_min"], sigma[-1] if full else 0.0, rtol=1e3 * rtol)
    assert got["rank_bound"] == rank
    assert got["rank_bound"].dtype == np.int32


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_against_float64_svd_where_rows_span_six_decades(algorithm):
    """As in real factors: graded rows of D, repeated rows of X, and zero rows."""
    rng = np.random.default_rng(5)
    num_tokens, num_out, num_in = 61, 53, 97
    x = rng.standard_normal((num_tokens, num_in)) * np.geomspace(1, 30, num_tokens)[:, None]
    x[10:20] = x[9]  # a repeated token in layer 0
    d = rng.standard_normal((num_tokens, num_out)) * np.geomspace(1e-8, 1e-2, num_tokens)[:, None]
    d[-1], d[0] = 0.0, 0.0
    x, d = x.astype(np.float32), d.astype(np.float32)
    exact = np.linalg.svd(d.T.astype(np.float64) @ x.astype(np.float64), compute_uv=False)
    got = statistics_of(x, d, algorithm)
    share = exact / exact.sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    np.testing.assert_allclose(got["nuclear_norm"], exact.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["sigma_max"], exact[0], rtol=1e-5)
    np.testing.assert_allclose(got["effective_rank"], np.exp(entropy), rtol=1e-4)
    assert got["rank_bound"] == min(num_tokens - 2, num_out)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_one_and_two_tokens(algorithm, num_tokens):
    rng = np.random.default_rng(num_tokens)
    x, d = rng.standard_normal((num_tokens, 11)), rng.standard_normal((num_tokens, 7))
    exact = np.linalg.svd(d.T @ x, compute_uv=False)[:num_tokens]
    got = statistics_of(x.astype(np.float32), d.astype(np.float32), algorithm)
    np.testing.assert_allclose(got["nuclear_norm"], exact.sum(), rtol=1e-5)
    assert got["sigma_min"] == 0.0
    if num_tokens == 1:
        np.testing.assert_allclose(got["effective_rank"], 1.0, rtol=1e-6)
        np.testing.assert_allclose(got["stable_rank"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_gradient_gives_zeros_and_no_nan_norm(algorithm):
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    got = statistics_of(x, np.zeros((5, 3), np.float32), algorithm)
    for name in ("nuclear_norm", "sigma_max", "sigma_min", "frobenius_norm", "entry_mean"):
        assert got[name] == 0.0, name
    assert got["entry_max"] == 0.0 and got["entry_min"] == 0.0 and got["rank_bound"] == 0
    assert np.isnan(got["effective_rank"]) and np.isnan(got["stable_rank"])
    assert np.isnan(got["condition_number"])


def test_the_columns_are_those_that_are_declared():
    x, d = np.ones((5, 7), np.float32), np.ones((5, 3), np.float32)
    declared = {column.name for column in (*columns.SPECTRA, *columns.EXTREMES)}
    for found in (statistics_of(x, d, "qr"), matrix_statistics(d.T @ x, x, d)):
        assert found.keys() == declared | set(FINITE_FLAGS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("where", ["x", "d"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_factor_gives_nan_and_not_zero(algorithm, where, poison):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 7)).astype(np.float32)
    d = rng.standard_normal((5, 3)).astype(np.float32)
    (x if where == "x" else d)[2, 1] = poison
    got = statistics_of(x, d, algorithm)
    assert (
        np.isnan(got["nuclear_norm"])
        and np.isnan(got["sigma_max"])
        and np.isnan(got["frobenius_norm"])
    )
    assert (got["input_finite"], got["output_grad_finite"]) == (where == "d", where == "x")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15])
def test_scaling_the_gradient_scales_the_norms(algorithm, scale):
    """Squares of 1e-30 underflow in float32: D is scaled by a power of two before it is squared."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 11)).astype(np.float32)
    d = rng.standard_normal((6, 7)).astype(np.float32)
    plain = statistics_of(x, d, algorithm)
    scaled = statistics_of(x, (d * np.float32(scale)).astype(np.float32), algorithm)
    np.testing.assert_allclose(scaled["nuclear_norm"], plain["nuclear_norm"] * scale, rtol=1e-5)
    np.testing.assert_allclose(scaled["stable_rank"], plain["stable_rank"], rtol=1e-5)
    undefined = plain["nuclear_norm"] * scale < 1e-12
    assert np.isnan(scaled["effective_rank"]) == undefined


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_rows_change_nothing(algorithm):
    """A zero row of D adds nothing, whatever X has there."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((9, 17)).astype(np.float32)
    d = rng.standard_normal((9, 13)).astype(np.float32)
    junk = rng.standard_normal((6, 17)).astype(np.float32) * 100
    padded = statistics_of(
        np.vstack([x, junk]), np.vstack([d, np.zeros((6, 13), np.float32)]), algorithm
    )
    plain = statistics_of(x, d, algorithm)
    for name in ("nuclear_norm", "sigma_max", "frobenius_norm", "effective_rank", "entry_mean"):
        np.testing.assert_allclose(padded[name], plain[name], rtol=3e-6)
    assert padded["rank_bound"] == plain["rank_bound"] == 9


def test_projections_with_one_input_share_its_factorization():
    """Three projections cost one QR of X and one each of D: four, not six."""
    x = jnp.zeros((5, 17), jnp.float32)
    grads = {"q": jnp.zeros((5, 11)), "k": jnp.zeros((5, 7)), "v": jnp.zeros((5, 7))}
    grads = {name: grad.astype(jnp.float32) for name, grad in grads.items()}

    def reduce(x, grads):
        return spectra_of_factors(prepare_factors(x, grads, dict.fromkeys(grads, "qr")))

    factorizations = _operand_ranks(jax.make_jaxpr(reduce)(x, grads).jaxpr, ("geqrf", "qr"))
    assert len(factorizations) == 4


def test_dense_agrees_with_the_known_spectrum():
    rng = np.random.default_rng(3)
    sigma = np.array([2.0, 0.5, 0.1])
    x, d = factors_with(sigma, 7, 13, 17, rng)
    matrix, x32, d32 = (array.astype(np.float32) for array in (d.T @ x, x, d))
    got = matrix_statistics(matrix, x32, d32)
    np.testing.assert_allclose(got["nuclear_norm"], sigma.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["entry_max"], (d.T @ x).max(), rtol=1e-5)
    np.testing.assert_allclose(got["entry_mean"], (d.T @ x).mean(), rtol=1e-4)
    assert got["rank_bound"] == 7


@pytest.mark.parametrize(
    ("shape", "backend", "method", "expected"),
    [
        ((100, 576, 576), "cpu", "auto", "gram"),
        ((191, 192, 576), "cpu", "auto", "gram"),
        ((256, 576, 576), "cpu", "auto", "qr"),
        ((224, 192, 576), "cpu", "auto", "build_gram"),  # k of SmolLM2
        ((560, 576, 576), "cpu", "auto", "qr"),
        ((640, 576, 576), "cpu", "auto", "build_gram"),
        ((640, 576, 576), "cpu", "factored", "qr"),
        ((190, 4096, 4096), "cpu", "auto", "gram"),
        ((190, 4096, 4096), "gpu", "auto", "gram"),
        ((640, 576, 576), "gpu", "auto", "build_gram"),
        ((190, 4096, 4096), "tpu", "auto", "jacobi"),
        ((5000, 4096, 4096), "tpu", "auto", "jacobi"),
    ],
)
def test_choice_of_algorithm(shape, backend, method, expected):
    assert choose_algorithm(*shape, backend=backend, method=method) == expected
    wide = choose_algorithm(*shape, backend=backend, method=method, is_float64=True)
    built = method == "auto" and shape[0] >= min(shape[1:])
    assert wide == ("build" if built else "qr")


@pytest.mark.parametrize(
    ("call", "primitives", "num_rows"),
    [
        (triangular_factor, ("geqrf", "qr"), 5),
        (singular_values, ("svd",), 5),
        (symmetric_eigenvalues, ("eigh", "ffi_call"), 5),
        (symmetric_eigenvalues, ("tridiagonal", "ffi_call"), linalg.TRIDIAGONAL_ROWS),
        (cholesky_factor, ("cholesky",), 5),
    ],
)
def test_lapack_calls_are_never_batched_on_the_cpu(call, primitives, num_rows):
    """A batched LAPACK call can deadlock in the jaxlib that Python 3.11 gets (jax#36927)."""
    batch = jnp.stack([jnp.eye(num_rows, dtype=jnp.float32)] * 3)
    nested = jnp.stack([batch] * 2)
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(call)))(nested)
    ranks = _operand_ranks(jaxpr.jaxpr, primitives)
    assert ranks and set(ranks) == {2}, ranks
    expected = np.stack([np.stack([np.asarray(call(m)) for m in b]) for b in nested])
    np.testing.assert_array_equal(jax.vmap(jax.vmap(call))(nested), expected)


@pytest.mark.parametrize("num_rows", [31, linalg.TRIDIAGONAL_ROWS + 1])
def test_eigenvalues_are_the_same_without_the_private_call(monkeypatch, num_rows):
    """If jaxlib's private call is gone, `eigvalsh` replaces it."""
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal((num_rows, num_rows))
    matrix = jnp.asarray(matrix @ matrix.T)
    assert linalg._has_values_only()
    quick = symmetric_eigenvalues(matrix)
    monkeypatch.setattr(linalg, "_has_values_only", lambda: False)
    atol = 1e-14 * float(
        quick[-1]
    )  # a few roundings of the largest, of which the smallest are made
    np.testing.assert_allclose(symmetric_eigenvalues(matrix), quick, rtol=1e-12, atol=atol)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), quick, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("num_rows", [1, 5, 111, 224, 337, 450])
def test_products_by_strips_are_the_plain_products(num_rows):
    """To float64's precision, for any number of rows, single and in a batch."""
    rng = np.random.default_rng(num_rows)
    rows = rng.standard_normal((2, num_rows, 37)) * np.geomspace(1e-6, 1, num_rows)[:, None]
    lower = np.tril(rng.standard_normal((2, num_rows, num_rows)))
    gram = rows @ rows.swapaxes(1, 2)
    both = lower.swapaxes(1, 2) @ gram @ lower
    upper = lower.swapaxes(1, 2)
    wide = upper[:, : -(-num_rows // 2)]  # R of a factor with fewer features than tokens
    for call, operands, exact in (
        (gram_matrix, (rows,), gram),
        (congruent, (lower, gram), both),
        (upper_product, (upper, upper[::-1]), upper @ upper[::-1].swapaxes(1, 2)),
        (upper_product, (wide, upper), wide @ lower),
        (upper_product, (upper, wide), upper @ wide.swapaxes(1, 2)),
    ):
        operands = [jnp.asarray(operand) for operand in operands]
        close = functools.partial(
            np.testing.assert_allclose, rtol=0, atol=1e-13 * np.abs(exact).max()
        )
        close(jax.vmap(call)(*operands), exact)
        close(call(*(operand[1] for operand in operands)), exact[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaling_is_exact_from_the_smallest_normal_number_to_the_largest(dtype):
    limits = np.finfo(dtype)
    for largest in (limits.tiny, 3e-20, 1.0, 6e20, limits.max):
        array = (np.array([1.0, -0.3, 1e-4, 0.0]) * largest).astype(dtype)
        scaled, exponent = jax.tree.map(np.asarray, scale_to_one(jnp.asarray(array)))
        assert 0.5 <= np.abs(scaled).max() < 1
        normal = np.abs(array) >= limits.tiny
        np.testing.assert_array_equal(np.ldexp(scaled, exponent)[normal], array[normal])
        given, same = scale_to_one(jnp.asarray(array), jnp.max(jnp.abs(jnp.asarray(array))))
        assert (np.asarray(given) == scaled).all() and same == exponent


def _operand_ranks(jaxpr, primitives):
    ranks = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in primitives:
            ranks.append(equation.invars[0].aval.ndim)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    ranks += _operand_ranks(inner, primitives)
    return ranks
