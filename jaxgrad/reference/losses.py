"""The losses of --loss in PyTorch, written independently of `gradients.loss`."""

from collections.abc import Callable

import torch

from jaxgrad.errors import UserError

IGNORED_LABEL = -100  # PyTorch's cross entropy skips these


def _response_mean(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL)


def _response_sum(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum"
    )


# Name -> function of each position's logits and of the token after it (or `IGNORED_LABEL`) -> scalar.
TORCH_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "response_mean": _response_mean,
    "response_sum": _response_sum,
}


def torch_loss(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of that name.

    Raises:
        UserError: there is none here.
    """
    if name not in TORCH_LOSSES:
        raise UserError(
            f"--loss={name}: the PyTorch reference has no such loss; it has {', '.join(TORCH_LOSSES)}"
        )
    return TORCH_LOSSES[name]
