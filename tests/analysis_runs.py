"""Runs for the tests of the analysis: tables with the values a test chooses, without a model."""

import dataclasses

import numpy as np

from jaxgrad.analysis import example_set
from jaxgrad.results import ExampleResult, examples_table, matrices_table
from jaxgrad.results.read import results_of

PROJECTIONS = ("q", "k", "v", "o")
OPTIONS = dict(
    protocol="paper", chat="no", max_length=64, dtype="float32", precision="highest",
    date="2026-11-23", method="auto", batch_tokens=1,
)  # fmt: skip


def identity(num_layers, weights="a1", **options):
    model = {"weights_sha256": weights, "config": {"num_layers": num_layers}}
    return {"options": OPTIONS | options, "model": model}


def example(
    index, norm_LP, *, instruction=None, response="r", tokens=7, loss=2.0, status="ok",
    truncated=False, projections=PROJECTIONS, layers=None, **columns,
):  # fmt: skip
    """An example with nuclear norms [L, P]; other columns of the matrices as [L, P] by name."""
    norm_LP = np.asarray(norm_LP, np.float64)
    layers = range(len(norm_LP)) if layers is None else layers
    matrices = {}
    if status != "skipped":
        matrices = {
            "layer": [layer for layer in layers for _ in projections],
            "projection": list(projections) * len(norm_LP),
            "nuclear_norm": norm_LP.ravel(),
        }
        matrices |= {name: np.asarray(value).ravel() for name, value in columns.items()}
    reason = None if status == "ok" else f"why {status}"
    return ExampleResult(
        index, f"id-{index}", tokens + 3, 3, tokens, truncated, loss, status, reason,
        f"question {index}" if instruction is None else instruction, response, matrices,
    )  # fmt: skip


def with_cosines(given, gradient_LPK, *, partner=True, layers=True):
    """The example with the cosines of these flattened gradients, as a run has them.

    `gradient_LPK`: one vector of K entries a matrix, layers and projections as in `example`.
    """
    gradient_LPK = np.asarray(gradient_LPK, np.float64)
    names = list(dict.fromkeys(given.matrices["projection"]))
    with np.errstate(invalid="ignore"):
        unit_LPK = gradient_LPK / np.linalg.norm(gradient_LPK, axis=-1, keepdims=True)
    columns = {}
    if layers:
        cosine_LPM = np.einsum("lpk,mpk->lpm", unit_LPK, unit_LPK)
        columns["layer_cosines"] = list(cosine_LPM.reshape(-1, len(unit_LPK)))
    if partner:
        cosine_LP = np.full(unit_LPK.shape[:2], np.nan)
        for one, two in (("q", "o"), ("k", "v")):
            if one in names and two in names:
                at = [names.index(one), names.index(two)]
                cosine_LP[:, at] = np.prod(unit_LPK[:, at], axis=1).sum(axis=-1, keepdims=True)
        columns["partner_cosine"] = cosine_LP.ravel()
    return dataclasses.replace(given, matrices={**given.matrices, **columns})


def results(examples, run=None, num_layers=None):
    if run is None:
        run = {"finished": True, "identity": identity(num_layers)}
    return results_of(run, examples_table(examples), matrices_table(examples))


def set_of(value_ELP, label="set", *, weights="a1", options=None, num_layers=None, **lists):
    """A set whose nuclear norms are the values; `lists` are one argument of `example` each."""
    value_ELP = np.asarray(value_ELP, np.float64)
    count, layers, projections = value_ELP.shape
    examples = [
        example(
            e, value_ELP[e], projections=PROJECTIONS[:projections],
            **{name: values[e] for name, values in lists.items()},
        )
        for e in range(count)
    ]  # fmt: skip
    shape = identity(layers if num_layers is None else num_layers, weights, **(options or {}))
    return example_set(results(examples, {"finished": True, "identity": shape}), label)
