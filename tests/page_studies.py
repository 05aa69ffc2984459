"""Studies for the tests of the report's page: curves that look like a model's, without a model."""

from pathlib import Path

import numpy as np
from analysis_runs import identity

from jaxgrad.analysis import ExampleSet, Resampling
from jaxgrad.analysis.example_set import LeftOut
from jaxgrad.analysis.similarity import Similarity
from jaxgrad.report.cells import Cell, Role
from jaxgrad.report.comparisons import compare_all
from jaxgrad.report.findings import Finding
from jaxgrad.report.tables import Column, Number, Table

QUICK = Resampling(num_resamples=100, num_permutations=100)
TEXT = (
    "A shop sells pens in packs of twelve. How many packs are needed for a class of thirty pupils who "
    "need two pens each, if one pack was lost on the way? Then say what is left over."
)
WORDS = TEXT.split()
TABLE = Table(
    "mad", "MAD of the nuclear norm", "A caption.",
    (Column("setting"), Column("q", "MAD"), Column("k", "MAD")),
    (
        ("none", Number(10.0, 9.0, 11.0), Number(float("nan"))),
        ("simplified", Number(9.5), Number(3.0)),
        ("detailed", Number(-2e-5), Number(20.0)),
    ),
)  # fmt: skip
FINDINGS = [
    Finding("Norms fall", "Smaller with reasoning.", ("V: 0.21 [0.18, 0.25].",), "stands"),
    Finding("Length explains it", "It turns round.", (), "falls"),
]


def role(model="Tiny-1B-Instruct", data="AQuA", setting="none", response="correct"):
    return Role(model, data, setting, response)


def run(layers):
    info = {
        "model": "Tiny-1B-Instruct", "commit": "0123456789abcdef0123", "device": {"kind": "cpu"},
        "versions": {"jaxgrad": "0.1.0", "jax": "0.10.2"}, "command": ["/secret/bin/analyze"],
        "data_path": "/secret/data.json",
    }  # fmt: skip
    return {
        "finished": True, "identity": identity(layers), "sessions": [{"info": info}],
        "finished_at": "2026-11-23T19:17:59+00:00",
    }  # fmt: skip


def cell(
    where, *, examples=24, layers=12, seed=0, level=4.0, ids=None, instructions=None,
    responses=None, reason="skipped: prompt fills max_length", similarity=True,
):  # fmt: skip
    """A run with smooth random curves; `level` scales its norms."""
    random = np.random.default_rng(seed)
    depth = np.linspace(0, 1, layers)
    shape = np.stack(
        [1 + 2 * np.exp(-8 * depth) + height * depth**3 for height in (0.2, 0.3, 2, 1)]
    )
    steps = 1 + 0.12 * random.standard_normal((layers, 4))
    size_E = np.exp(0.4 * random.standard_normal(examples))
    noise = np.exp(0.15 * random.standard_normal((examples, layers, 4)))
    norm = level * shape.T * steps * size_E[:, None, None] * noise * [0.4, 0.6, 2.0, 1.5]
    ratio = np.clip(0.25 + 0.15 * depth[:, None] + 0.05 * random.random(norm.shape), 0, 1)
    rank = 4 + 20 * random.random((examples, 1, 1)) + 3 * random.random(norm.shape)
    texts = [" ".join(random.permutation(WORDS)[: 12 + e % 15].tolist()) for e in range(examples)]
    answers = [" ".join(random.permutation(WORDS)[: 4 + e % 20].tolist()) for e in range(examples)]
    found = ExampleSet(
        label=f"{where.model}, {where.title}",
        run=run(layers),
        layers=tuple(range(layers)),
        projections=("q", "k", "v", "o"),
        index_E=np.arange(examples),
        occurrence_E=np.zeros(examples, np.int64),
        example_ids=tuple(ids or (f"aqua-{e:03d}" for e in range(examples))),
        instructions=tuple(instructions or texts),
        responses=tuple(responses or answers),
        truncated_E=np.arange(examples) == 1,
        column_E={
            "loss": 0.4 + random.random(examples),
            "num_response_tokens": np.arange(examples) * 3.0 + 5,
        },
        column_ELP={
            "nuclear_norm": norm, "sigma_max": norm * ratio, "effective_rank": rank,
            "rank_bound": np.full(norm.shape, 40.0),
        },
        left_out=(LeftOut(examples, "too-long", reason),),
    )  # fmt: skip
    return Cell(where, Path("/secret/run"), found, cosines(layers, random) if similarity else None)


def cosines(layers, random):
    distance = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    smooth = np.exp(-distance / 2.5) * np.cos(distance / 2)
    matrices = np.stack([smooth * scale for scale in (1, 0.8, 0.6, 0.9)])
    matrices += 0.05 * random.standard_normal(matrices.shape)
    matrices = (matrices + matrices.transpose(0, 2, 1)) / 2
    matrices[:, range(layers), range(layers)] = 1
    return Similarity(tuple(range(layers)), ("q", "k", "v", "o"), matrices, None, None, 24, 0)


def small_study(**options):
    """One model, one data set: three settings, correct and irrelevant."""
    levels = {"none": 5.0, "simplified": 2.0, "detailed": 1.0}
    cells = [
        cell(
            role(setting=setting, response=response),
            seed=3 * place + (response == "irrelevant"),
            level=level * (1.3 if response == "irrelevant" else 1),
            **options,
        )
        for response in ("correct", "irrelevant")
        for place, (setting, level) in enumerate(levels.items())
    ]
    return compare_all(
        cells,
        title="Fast and slow thinking on AQuA",
        about="Does a response with more reasoning ask the model for smaller changes, and is "
        "what we see there more than the length of the response?",
        unavailable={"GSM8K, detailed": "there is no such file in the data directory"},
        resampling=QUICK,
    )


def large_study(models=10, data_sets=9, **options):
    """As many runs as the paper's largest table has; settings differ from data set to data set."""
    cells = [
        cell(
            role(f"Model-{m}B", f"Set {d}", ("none", "simplified", "detailed")[d % 3]),
            seed=100 * m + d, **({"examples": 50, "layers": 32} | options),
        )
        for m in range(models)
        for d in range(data_sets)
    ]  # fmt: skip
    return compare_all(cells, title="Ten models, nine data sets", resampling=QUICK)
