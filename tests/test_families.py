"""Every family against transformers and PyTorch: logits, losses, and the spectra of every gradient.

The gradients come from our factors, their spectra from NumPy: the program's own reduction does not depend
on the family, and is tested in `test_parity` and `test_spectra`. Two examples share a padded batch. One is
longer than the window and than the length at which longrope changes its factors, one is shorter than that.
"""

import dataclasses

import family_models
import jax
import numpy as np
import pytest
from test_parity import LONG, OPTIONS, SHORT, Case, our_logits, torch_logits

from jaxgrad import reference
from jaxgrad.data.batches import Batch, BatchShape, batch_arrays
from jaxgrad.gradients.factors import example_gradients
from jaxgrad.gradients.selection import parameter_names
from jaxgrad.models.decoder import projections_of

SHAPE = BatchShape(2, 64, 48)
# float32: the difference of two correct programs. PyTorch's effective rank counts its rounding noise.
TOLERANCES = {
    "float32": {"logits": 1e-5, "loss": 1e-5, "norms": 1e-4, "effective_rank": 5e-4},
    "float64": dict.fromkeys(("logits", "loss", "norms", "effective_rank"), 1e-8),
}
NORMS = ("nuclear_norm", "sigma_max", "frobenius_norm")


@pytest.fixture(scope="module", params=family_models.MODELS)
def case(request, tmp_path_factory):
    model = family_models.MODELS[request.param]
    return Case(family_models.save_model(model, tmp_path_factory.mktemp("model")))


# float32 takes as long again and tells less: one model of each family, the others by hand.
FIRST = {model.model_type: name for name, model in reversed(family_models.MODELS.items())}.values()
OTHERS = [name for name in family_models.MODELS if name not in FIRST]


def test_a_family_gives_pytorch_s_numbers(case):
    compare_with_pytorch(case, "float64")


@pytest.mark.parametrize("case", list(FIRST), indirect=True)
def test_a_family_in_float32(case):
    compare_with_pytorch(case, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, indirect=True)
def test_all_of_a_family_in_float32(case):
    compare_with_pytorch(case, "float32")


def compare_with_pytorch(case, dtype):
    allowed = TOLERANCES[dtype]
    short, long = (item.token_ids for item in case.tokenized)
    assert len(short) < family_models.SHORT_LENGTH < len(long)
    assert len(long) > 3 * family_models.WINDOW
    expected = torch_logits(case.torch_model(dtype), long.tolist())
    error = np.abs(our_logits(case.model(dtype), long) - expected).max() / np.abs(expected).max()
    assert error < allowed["logits"]

    tokenizer = case.model("float32").tokenizer
    theirs = list(
        reference.measure_in_torch(case.torch_model(dtype), tokenizer, [SHORT, LONG], OPTIONS)
    )
    losses, gradients = our_gradients(case, dtype)
    for b, row in enumerate(theirs):
        assert losses[b] == pytest.approx(row.loss, rel=allowed["loss"])
        names = list(zip(row.matrices["projection"], row.matrices["layer"], strict=True))
        assert len(names) == len(parameter_names(case.model(dtype).config))
        for index, (projection, layer) in enumerate(names):
            ours = describe(gradients[projection][b, layer or 0])
            for statistic, value in ours.items():
                tolerance = allowed["norms" if statistic in NORMS else statistic]
                wanted = row.matrices[statistic][index]
                assert value == pytest.approx(wanted, rel=tolerance), (projection, layer, statistic)


def our_gradients(case, dtype):
    """Losses [B], and the gradients [B, L, O, I] of every projection."""
    model = case.model(dtype)
    names = projections_of(model.config)
    batch = batch_arrays(Batch(SHAPE, (0, 1)), case.tokenized)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):

        def one(example):
            loss, factors, _ = example_gradients(model.graphdef, model.state, example, names)
            return loss, factors

        losses, factors = jax.device_get(jax.jit(jax.vmap(one))(batch))
    gradients = {
        name: np.einsum(
            "blto,blti->bloi",
            factor.output_grad_LTO.astype(np.float64),
            factor.input_LTI.astype(np.float64),
        )
        for name, factor in factors.items()
    }
    return losses, gradients


def describe(gradient_OI):
    sigma = np.linalg.svd(gradient_OI, compute_uv=False)
    share = sigma[sigma > 0] / sigma.sum()
    return {
        "nuclear_norm": sigma.sum(),
        "sigma_max": sigma[0],
        "frobenius_norm": np.sqrt((gradient_OI**2).sum()),
        "effective_rank": np.exp(-np.sum(share * np.log(share))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_whole_program_gives_pytorch_s_numbers(case, dtype):
    """The same through `bin/compare`: our own reduction, one program per length, extremes."""
    options = dataclasses.replace(OPTIONS, dtype=dtype, spectrum=False)
    comparison = reference.compare_with_torch(
        case.directory, [SHORT, LONG], options, say=lambda _: None, progress=False
    )
    tolerances = reference.default_tolerances(dtype)
    assert not comparison.beyond(tolerances), comparison.table(tolerances)
