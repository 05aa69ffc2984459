"""Programs made for a TPU and a GPU, run on the CPU, give the numbers of the program made for the CPU."""

import dataclasses

import numpy as np
import pytest
from soak import CONFIG
from test_layerwise import random_arrays, random_state

from jaxgrad.data.batches import BatchShape
from jaxgrad.errors import UserError
from jaxgrad.gradients.selection import select_parameters
from jaxgrad.measure.programs import Programs
from jaxgrad.measure.reduction import groups_at_once
from jaxgrad.options import AnalyzeOptions, MeasureSettings
from jaxgrad.runs.plan import settings_for
from jaxgrad.spectra import FINITE_FLAGS, compiled_for, target

ALL = MeasureSettings(
    select_parameters(CONFIG, "all"), spectrum=True, extremes=True, similarity=True
)


def measured(settings, shape=BatchShape(2, 40, 16), used=(9, 16)):
    programs = Programs(CONFIG, "float32", settings)
    return programs.measure(random_state(CONFIG), shape, random_arrays(shape, used))[1]


@pytest.fixture(scope="module")
def on_the_cpu():
    return measured(ALL)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("tpu", {}),
        pytest.param("tpu", {"method": "dense"}, marks=pytest.mark.slow),
        pytest.param("tpu", {"layerwise": True, "similarity": False}, marks=pytest.mark.slow),
        ("gpu", {}),
    ],
)
def test_the_same_numbers_for_every_backend(on_the_cpu, backend, changes):
    found = measured(dataclasses.replace(ALL, backend=backend, **changes))
    for name, expected in on_the_cpu.items():
        for field in found[name].keys() - set(FINITE_FLAGS):
            got, want = found[name][field], expected[field]
            assert got.shape[:2] == want.shape[:2], (name, field)
            # The smallest values are noise of the largest, and the condition number divides by one.
            atol = 2e-6 * expected["sigma_max"].max() if field.startswith(("entry", "sing")) else 0
            atol = 2e-6 if field.endswith("cosine") or field.endswith("cosines") else atol
            if field in ("sigma_min", "condition_number"):
                continue
            rtol = 1e-4 if field in ("effective_rank", "singular_values") else 1e-5
            values = min(got.shape[-1], want.shape[-1]) if field == "singular_values" else None
            np.testing.assert_allclose(
                got[..., :values] if values else got,
                want[..., :values] if values else want,
                rtol=rtol, atol=atol, err_msg=f"{name} {field}",
            )  # fmt: skip


def test_what_a_program_is_traced_for():
    assert target() == "cpu"
    with compiled_for("tpu"):
        assert target() == "tpu"
    assert target() == "cpu"


def test_a_tpu_reduces_all_projections_of_a_layer_by_one_call():
    assert len(groups_at_once(ALL)) > 2
    groups = groups_at_once(dataclasses.replace(ALL, backend="tpu"))
    assert [name for group in groups for names in group for name in names] == list(
        ALL.selection.names
    )
    assert [len(group) for group in groups] == [len(groups_at_once(ALL)) - 1, 1]  # lm_head apart


def test_a_tpu_has_no_float64():
    with pytest.raises(UserError, match="--dtype=float64: a TPU has no float64"):
        settings_for(AnalyzeOptions(dtype="float64"), CONFIG, backend="tpu")
