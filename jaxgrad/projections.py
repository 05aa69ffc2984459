"""The names of a decoder's linear maps, and the address of a measured matrix."""

from typing import NamedTuple

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
HEAD = "lm_head"
# The order inside a layer, wherever matrices are listed; the head comes after all layers.
PROJECTION_NAMES = (*ATTENTION, *MLP, HEAD)
# Projections of one layer whose gradients are compared with each other (arXiv 2504.10766, section 3.3).
PARTNER_PAIRS = (("q", "o"), ("k", "v"))
PARTNERS = {one: other for pair in PARTNER_PAIRS for one, other in (pair, pair[::-1])}


class MatrixAddress(NamedTuple):
    """Which weight a gradient matrix belongs to.

    Attributes:
        layer: from 0; None for `lm_head`.
        projection: one of `PROJECTION_NAMES`.
        expert: from 0; None outside a mixture of experts.
        part: of a weight that is measured in parts, such as an adapter's "lora_A"; None for a whole one.
    """

    layer: int | None
    projection: str
    expert: int | None = None
    part: str | None = None

    @property
    def within_layer(self) -> str:
        """The address without its layer, as one word: "q", "up.3", "q.lora_A"."""
        return within_layer(self.projection, self.expert, self.part)

    @property
    def order(self) -> tuple[bool, int, int, int, str]:
        """Sorts addresses: by layer, in a layer by projection, expert and part; the head is last."""
        return (
            self.layer is None,
            -1 if self.layer is None else self.layer,
            PROJECTION_NAMES.index(self.projection),
            -1 if self.expert is None else self.expert,
            self.part or "",
        )


def within_layer(projection: str, expert: int | None = None, part: str | None = None) -> str:
    """A projection, or an expert's or a part of one, as one word."""
    return ".".join(str(word) for word in (projection, expert, part) if word is not None)
