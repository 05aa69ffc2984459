"""Which loss a run's gradients are of.

`gradients.loss` defines the losses; it needs JAX, and what reads a run does not. Two losses are named here,
because some numbers and files are right for one of them alone.
"""

from collections.abc import Mapping
from typing import Any

from jaxgrad.options import with_later_options

# Sums of token losses over the response; the first is divided by the number of response tokens.
RESPONSE_MEAN, RESPONSE_SUM = "response_mean", "response_sum"


def loss_of(run: Mapping[str, Any]) -> str:
    """The name of a run's loss.

    | content of run.json | loss |
    |---|---|
    | identity.options.loss | as it says |
    | none: an earlier version, or the default | response_mean |
    | no identity: read from the authors' JSONL | response_mean |
    """
    options = run.get("identity", {}).get("options", {})
    return str(with_later_options(options)["loss"])
