"""Losses: by every path of the program, against PyTorch, and what a run says of its loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import Tiny

import jaxgrad
from jaxgrad import reference
from jaxgrad.data.examples import Example, Message
from jaxgrad.errors import UserError
from jaxgrad.gradients.loss import CHUNK, LOSSES, Head, cross_entropy, find_loss
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


MEMORIZED_EXAMPLE = Example(2, "c", (Message("user", "how long does"),), "!")


@pytest.fixture(scope="module")
def memorizing_model_dir(tmp_path_factory):
    """A tiny model whose head gives the response's one token a loss of about 1e-8."""
    directory = tmp_path_factory.mktemp("memorizing")
    path = tiny_models.save_tiny(Tiny(num_heads=4, num_kv_heads=2, tied=False, width=52), directory)
    torch_model = reference.load_torch_model(str(path))
    encoding = reference.encode_example(
        MEMORIZED_EXAMPLE, jaxgrad.load_model(str(path)).tokenizer, OPTIONS
    )
    assert len(encoding.token_ids) == encoding.num_prompt_tokens + 1
    with torch.no_grad():
        hidden = torch_model.model(torch.tensor([encoding.token_ids[:-1]])).last_hidden_state[0, -1]
        label = encoding.token_ids[-1]
        others = torch.logsumexp(
            torch.cat([(w := torch_model.lm_head.weight)[:label], w[label + 1 :]]) @ hidden, 0
        )
        w[label] = hidden * (others + 18.4) / (hidden @ hidden)
    torch_model.save_pretrained(path)
    return str(path)


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


# Memorized answers: where the label's probability is near 1, softmax - onehot cancels. To 1e-4 of the
# largest entry; measured 1e-6.
MEMORIZED = [1.0, 1e-2, 1e-4, 1e-6, 1e-8]


def logits_with_loss(loss, num_positions, num_tokens):
    """Float32 logits and labels whose loss is about the given one; both derivatives' exact values."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(num_positions, num_tokens))
    labels = rng.integers(0, num_tokens, num_positions).astype(np.int32)
    at_label = np.arange(num_positions), labels
    logits[at_label] = -np.inf
    logits[at_label] = np.log(np.exp(logits).sum(axis=1) / np.expm1(loss))
    logits = logits.astype(np.float32)
    exact = logits.astype(np.float64)
    odds = np.exp(exact - exact[at_label][:, None])
    odds[at_label] = 0
    others = odds.sum(axis=1)
    gradient = odds / (1 + others)[:, None]
    gradient[at_label] = -others / (1 + others)
    return logits, labels, np.log1p(others), gradient


@pytest.mark.parametrize("num_positions", [7, CHUNK + 9])
@pytest.mark.parametrize("loss", MEMORIZED)
def test_a_memorized_answer_keeps_its_loss_and_gradient(loss, num_positions):
    logits, labels, losses, gradient = logits_with_loss(loss, num_positions, 41)
    weights = np.full(num_positions, 1 / num_positions)
    # The head is the identity, so the derivative by the rows is that by the logits.
    function = jax.value_and_grad(lambda x: cross_entropy(Head(lambda x: x), x, labels, weights))
    value, by_logits = function(jnp.asarray(logits))
    assert value == pytest.approx(losses.mean(), rel=1e-4)
    np.testing.assert_allclose(
        by_logits * num_positions, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max()
    )


@pytest.mark.parametrize("loss", MEMORIZED)
def test_the_reference_keeps_a_memorized_answer_too(loss):
    logits, labels, losses, gradient = logits_with_loss(loss, 7, 41)
    logits_TV = torch.tensor(logits, requires_grad=True)
    value = torch_loss("response_mean")(logits_TV.double(), torch.tensor(labels).long())
    value.backward()
    assert value.item() == pytest.approx(losses.mean(), rel=1e-4)
    np.testing.assert_allclose(
        logits_TV.grad * 7, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max()
    )


def test_a_memorized_answer_is_measured_as_in_float64(memorizing_model_dir):
    options = dataclasses.replace(OPTIONS, loss="response_mean", spectrum=False)
    rows = {}
    for dtype in ("float32", "float64"):
        model = jaxgrad.load_model(memorizing_model_dir, dtype=dtype)
        (rows[dtype],) = jaxgrad.analyze(model, [MEMORIZED_EXAMPLE], options)
    assert 1e-9 < rows["float64"].loss < 1e-7
    assert rows["float32"].loss == pytest.approx(rows["float64"].loss, rel=1e-4)
    for name in ("nuclear_norm", "sigma_max", "frobenius_norm", "effective_rank"):
        np.testing.assert_allclose(
            rows["float32"].matrices[name], rows["float64"].matrices[name], rtol=1e-4, err_msg=name
        )
