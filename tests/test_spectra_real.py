"""Every algorithm on the factors of the embedded model, against a float64 SVD of the built gradient.

The tolerances are the project's promise: 1e-5 for the norms, 1e-4 for the effective rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.checkpoints import load_model
from jaxgrad.data.batches import example_arrays
from jaxgrad.gradients.factors import example_gradients
from jaxgrad.spectra import prepare_factors, spectra_of_factors, with_jacobi_values

NAMES = ("q", "k", "v", "o")
LAYERS = np.array([0, 14, 29])
ALGORITHMS = ["qr", "gram", "build", "build_gram", "jacobi"]
TEXT = "Add 17 and 25. The units give 12, so write 2 and carry 1; the tens give 1 + 2 + 1 = 4. It is 42."
# Text, tokens, response tokens: one and two tokens, one token repeated, and texts longer than the short
# side of k and v (192).
CASES = {
    "one token": ("Add", 1, 1),
    "two tokens": ("Add 17", 2, 1),
    "one response token": (TEXT, 24, 1),
    "a repeated token": (" no" * 40, 40, 30),
    "a text": (TEXT, 36, 20),
    "more tokens than k has rows": (TEXT * 6, 210, 100),
    "a repeated token, more often than k has rows": (" no" * 210, 210, 200),
}
PADDING = 5


@functools.cache
def model():
    return load_model(None)


@functools.cache
def factors(case):
    """Projection -> X and D [3, T + PADDING, features] float32; the padding of D is zero."""
    text, num_tokens, num_responses = CASES[case]
    token_ids = model().tokenizer.encode(text)[:num_tokens]
    assert len(token_ids) == num_tokens
    positions = np.arange(num_tokens - num_responses, num_tokens)
    # The last token has no next one, so its label is the first token.
    labels = np.array([*token_ids, token_ids[0]])[positions + 1]
    weights = np.full(num_responses, 1 / num_responses)
    padded = [*token_ids, *[0] * PADDING]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        example = example_arrays(padded, positions, labels, weights)
        take = jax.jit(example_gradients, static_argnums=(0, 3))
        _, found, _ = take(model().graphdef, model().state, example, NAMES)
    return {
        name: (np.asarray(pair.input_LTI)[LAYERS], np.asarray(pair.output_grad_LTO)[LAYERS])
        for name, pair in found.items()
    }


@functools.cache
def exact(case):
    """Projection -> singular values [3, min(O, I)] of the gradient, built and decomposed in float64."""
    return {
        name: np.stack(
            [
                np.linalg.svd(d.T.astype(np.float64) @ x.astype(np.float64), compute_uv=False)
                for x, d in zip(*pair, strict=True)
            ]
        )
        for name, pair in factors(case).items()
    }


def reduced(case, algorithm):
    """Projection -> statistics [3], as the program reduces them: one layer at a time."""

    @jax.jit
    def reduce(layers):
        def reduce_layer(layer):
            inputs, grads = layer
            found, groups = {}, []
            for names in (("q", "k", "v"), ("o",)):
                ways = dict.fromkeys(names, algorithm)
                shared = {name: grads[name] for name in names}
                groups.append(prepare_factors(inputs[names[0]], shared, ways))
            for factors in with_jacobi_values(groups):
                found |= spectra_of_factors(factors)
            return {
                name: {key: value for key, value in columns.items() if key != "singular_values"}
                for name, columns in found.items()
            }

        return jax.lax.map(reduce_layer, layers)

    pairs = factors(case)
    inputs = {name: jnp.asarray(pairs[name][0]) for name in ("q", "o")}
    grads = {name: jnp.asarray(pair[1]) for name, pair in pairs.items()}
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, reduce((inputs, grads)))


def can_be_chosen(algorithm, name, case):
    """G is built only if T is at least its short side, so that it is no larger than the core."""
    num_rows = min(factors(case)[name][1].shape[-1], factors(case)[name][0].shape[-1])
    return "build" not in algorithm or CASES[case][1] + PADDING >= num_rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_the_promised_accuracy(case, algorithm):
    names = [name for name in NAMES if can_be_chosen(algorithm, name, case)]
    got = reduced(case, algorithm) if names else {}
    for name in names:
        sigma = exact(case)[name]
        if case == "one token" and name in "qk":  # one token attends only to itself: no gradient
            assert not sigma.any() and not got[name]["nuclear_norm"].any()
            assert np.isnan(got[name]["effective_rank"]).all()
            continue
        share = sigma / sigma.sum(axis=1, keepdims=True)
        share = np.where(share > 0, share, 1.0)  # 1 log 1 adds nothing
        rank = np.exp(-(share * np.log(share)).sum(axis=1))
        np.testing.assert_allclose(got[name]["nuclear_norm"], sigma.sum(axis=1), rtol=1e-5)
        np.testing.assert_allclose(got[name]["sigma_max"], sigma[:, 0], rtol=1e-5)
        np.testing.assert_allclose(got[name]["effective_rank"], rank, rtol=1e-4)


def test_the_cases_are_as_hard_as_they_say():
    for case, (_, num_tokens, num_responses) in CASES.items():
        for name, (input_LTI, grad_LTO) in factors(case).items():
            assert np.isfinite(input_LTI).all()
            assert not grad_LTO[:, num_tokens:].any(), (case, name)
            # In the last layer only the response has gradients of q and o.
            if name == "o" or (name == "q" and case != "one token"):
                alive = grad_LTO[-1].any(axis=-1).sum()
                assert alive == num_responses, (case, name)
    repeated = factors("a repeated token")["q"][0][0, :40]
    assert (repeated == repeated[-1]).all(axis=1).sum() >= 39
