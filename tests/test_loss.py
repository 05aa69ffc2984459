"""Losses: by every path of the program, against PyTorch, and what a run says of its loss."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from tiny_models import Tiny

import jaxgrad
from jaxgrad import reference
from jaxgrad.data.examples import Example, Message
from jaxgrad.errors import UserError
from jaxgrad.gradients.loss import LOSSES, find_loss
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.losses import TORCH_LOSSES, torch_loss

OPTIONS = AnalyzeOptions(chat="no", max_length=96, loss="response_sum", spectrum=True)
EXAMPLES = [
    Example(0, "a", (Message("user", "how long does"),), "an hour"),
    # More than one chunk of response positions.
    Example(1, "b", (Message("user", "Who waits?"),), "def wait(a): return 12  # naïve " * 4),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tiny = Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52)
    return str(tiny_models.save_tiny(tiny, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(model_dir):
    return jaxgrad.load_model(model_dir)


def measured(model, **changes):
    rows = jaxgrad.analyze(model, EXAMPLES, dataclasses.replace(OPTIONS, **changes))
    return sorted(rows, key=lambda row: row.example_index)


@pytest.mark.parametrize(
    "path",
    [{}, {"method": "dense"}, {"layerwise": "yes"}, {"parameters": "all"}],
    ids=["factors", "dense", "layerwise", "with the head"],
)
def test_the_summed_loss_is_pytorchs_by_every_path(model, model_dir, path):
    options = dataclasses.replace(OPTIONS, **path)
    torch_model = reference.load_torch_model(model_dir)
    expected = list(reference.measure_in_torch(torch_model, model.tokenizer, EXAMPLES, options))
    comparison = reference.compare_results(measured(model, **path), expected)
    assert not comparison.beyond(reference.default_tolerances("float32")), comparison.table()


def test_the_sum_is_the_mean_times_the_tokens(model):
    means, sums = measured(model, loss="response_mean"), measured(model)
    for mean, total in zip(means, sums, strict=True):
        tokens = mean.num_response_tokens
        assert tokens > 1 and total.loss == pytest.approx(tokens * mean.loss, rel=1e-6)
        for name in ("nuclear_norm", "sigma_max", "entry_mean"):
            np.testing.assert_allclose(
                total.matrices[name], tokens * mean.matrices[name], rtol=1e-4, err_msg=name
            )


def test_the_reference_has_a_formula_for_each_loss():
    assert TORCH_LOSSES.keys() == LOSSES.keys()
    assert all(name == loss.name for name, loss in LOSSES.items())


@pytest.mark.parametrize("ask", [find_loss, torch_loss])
def test_an_unknown_loss_is_named_with_those_that_there_are(ask):
    with pytest.raises(UserError, match=r"--loss=mean\b.* response_mean, response_sum"):
        ask("mean")


def test_the_default_loss_leaves_a_runs_identity_as_it_was():
    assert "loss" not in AnalyzeOptions().identity()
    assert OPTIONS.identity()["loss"] == "response_sum"
