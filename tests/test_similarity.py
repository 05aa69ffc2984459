"""Cosines between gradients: by factors, by the definition, and by PyTorch."""

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_parity import LONG, OPTIONS, Case

from jaxgrad import reference
from jaxgrad.options import AnalyzeOptions
from jaxgrad.pipeline import analyze
from jaxgrad.projections import PARTNERS
from jaxgrad.reference.weights import select_weights
from jaxgrad.results import columns
from jaxgrad.spectra import matrix_similarities, similarities

T, L = 7, 4
# Projection -> (outputs, inputs). q and o are not square; their sizes share the divisor 4.
SHAPES = {"q": (20, 12), "k": (6, 12), "v": (6, 12), "o": (12, 20), "up": (300, 12)}
LAYERS = dict.fromkeys(SHAPES, tuple(range(L)))


def random_factors(dtype=np.float32, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(0)
    return {
        name: (
            jnp.asarray(rng.standard_normal((L, T, num_in)), dtype),
            jnp.asarray(scale * rng.standard_normal((L, T, num_out)), dtype),
        )
        for name, (num_out, num_in) in shapes.items()
    }


def built(factors):
    return {
        name: np.einsum("lto,lti->loi", *(np.asarray(x, np.float64) for x in (grad, inputs)))
        for name, (inputs, grad) in factors.items()
    }


def cosine(one, other):
    one, other = one.reshape(-1), other.reshape(-1)
    return one @ other / np.sqrt((one @ one) * (other @ other))


def check(found, matrices, tolerance):
    for name, values in found.items():
        assert values.keys() == {column.name for column in columns.SIMILARITIES}
        expected = [[cosine(a, b) for b in matrices[name]] for a in matrices[name]]
        np.testing.assert_allclose(values["layer_cosines"], expected, rtol=0, atol=tolerance)
        partner = PARTNERS.get(name)
        if partner is None:
            assert np.isnan(values["partner_cosine"]).all()
            continue
        pairs = zip(matrices[name], matrices[partner], strict=True)
        expected = [cosine(a, b) for a, b in pairs]
        np.testing.assert_allclose(values["partner_cosine"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "q_shape", [(20, 12), (12, 12), (7, 11), (300, 4), (256, 320)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_factors_give_the_cosines_of_the_flattened_gradients(q_shape):
    shapes = SHAPES | {"q": q_shape, "o": q_shape[::-1]}
    factors = random_factors(shapes=shapes)
    check(similarities(factors, LAYERS), built(factors), 1e-6)


def test_the_definition_gives_the_same():
    factors = random_factors()
    matrices = {name: jnp.asarray(m, jnp.float32) for name, m in built(factors).items()}
    check(matrix_similarities(matrices, LAYERS), built(factors), 1e-6)


def test_in_float64_to_its_precision():
    with jax.enable_x64(True):
        factors = random_factors(np.float64)
        check(similarities(factors, LAYERS), built(factors), 1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_neither_underflow_nor_overflow(scale):
    factors = random_factors(scale=scale)
    check(similarities(factors, LAYERS), built(random_factors()), 1e-6)


def test_padding_changes_nothing():
    factors = random_factors()
    padded = {
        name: tuple(jnp.pad(x, ((0, 0), (0, 5), (0, 0))) for x in pair)
        for name, pair in factors.items()
    }
    check(similarities(padded, LAYERS), built(factors), 1e-6)


def test_a_zero_gradient_has_no_cosine():
    factors = random_factors()
    inputs, grad = factors["k"]
    factors["k"] = (inputs, grad.at[2].set(0.0))
    found = similarities(factors, LAYERS)
    undefined = np.isnan(found["k"]["layer_cosines"])
    assert undefined[2].all() and undefined[:, 2].all() and undefined.sum() == 2 * L - 1
    assert np.isnan(found["v"]["partner_cosine"]).tolist() == [False, False, True, False]


def test_partners_of_other_layers_are_not_compared():
    found = similarities(random_factors(), LAYERS | {"o": (1, 2, 3, 4)})
    assert (
        np.isnan(found["q"]["partner_cosine"]).all()
        and np.isnan(found["o"]["partner_cosine"]).all()
    )
    assert not np.isnan(found["k"]["partner_cosine"]).any()


# q and o are not square here: four heads of 14 entries, a width of 52.
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_an_analysis_gives_pytorch_s_cosines(tmp_path, method):
    case = Case(family_models.save_model(family_models.MODELS["gemma2_mha"], tmp_path))
    options = AnalyzeOptions(chat="no", max_length=64, method=method, similarity=True)
    (row,) = analyze(case.model("float32"), [LONG], options)
    model = case.torch_model("float32")
    list(reference.measure_in_torch(model, case.model("float32").tokenizer, [LONG], OPTIONS))
    gradients = {
        (weight.projection, weight.layer): weight.gradient().double()
        for weight in select_weights(model, "attention")
    }
    addresses = list(zip(row.matrices["projection"], row.matrices["layer"], strict=True))
    assert len(addresses) == len(gradients) == 12
    for i, (projection, layer) in enumerate(addresses):
        mine = gradients[projection, layer].reshape(-1)
        other = gradients[PARTNERS[projection], layer].reshape(-1)
        layers = [gradients[projection, j].reshape(-1) for j in range(3)]
        expected = [torch.cosine_similarity(mine, x, dim=0).item() for x in (other, *layers)]
        found = [row.matrices["partner_cosine"][i], *row.matrices["layer_cosines"][i]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
