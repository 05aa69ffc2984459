"""Lists of names that are needed in two forms, and must agree."""

import jax.numpy as jnp
import pytest
from decoder_configs import tiny_config

from jaxgrad.dtypes import DTYPES
from jaxgrad.models.decoder import PROJECTIONS, projections_of
from jaxgrad.models.device_sizes import projection_sizes
from jaxgrad.options import DTYPE_NAMES
from jaxgrad.projections import HEAD, PARTNERS, PROJECTION_NAMES


def test_every_dtype_that_can_be_asked_for_has_its_value():
    assert tuple(DTYPES) == DTYPE_NAMES
    assert [jnp.dtype(dtype).name for dtype in DTYPES.values()] == list(DTYPE_NAMES)


def test_every_projection_has_a_site_and_sizes():
    assert tuple(PROJECTIONS) == tuple(projection_sizes(tiny_config())) == PROJECTION_NAMES
    assert [name for name, site in PROJECTIONS.items() if not site.stacked] == [HEAD]


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, set()),
        ({"gated_mlp": False}, {"gate"}),
        ({"tied_embeddings": True}, {"lm_head"}),
        ({"gated_mlp": False, "tied_embeddings": True}, {"gate", "lm_head"}),
    ],
)
def test_a_decoder_has_all_projections_but_the_gate_and_the_head(changes, absent):
    found = projections_of(tiny_config(**changes))
    assert found == tuple(name for name in PROJECTION_NAMES if name not in absent)


def test_partners_are_mutual():
    assert all(PARTNERS[PARTNERS[name]] == name for name in PARTNERS)
