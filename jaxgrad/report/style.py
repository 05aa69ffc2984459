"""How projections and statistics look and what they are called, in figures and on the page alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

# Okabe & Ito's palette: told apart with every common kind of colour blindness. Their yellow is left
# out: on white paper it cannot be seen.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: colour, dash and marker each tell it apart alone.

    Attributes:
        title: What a legend calls it: "Q".
        colour: "#RRGGBB".
        dash: Lengths of dashes and gaps in line widths; empty for a solid line.
        marker: Matplotlib's letter.
        symbol: Plotly's name of the same marker.
    """

    title: str
    colour: str
    dash: tuple[float, ...]
    marker: str
    symbol: str

    @property
    def linestyle(self) -> str | tuple[float, tuple[float, ...]]:
        """For Matplotlib."""
        return (0.0, self.dash) if self.dash else "solid"

    def plotly_dash(self, width: float = 2.0) -> str:
        """For Plotly: "solid" or lengths like "10px,4px".

        Args:
            width: Of the line, in pixels.
        """
        return ",".join(f"{length * width:g}px" for length in self.dash) or "solid"


class StatisticName(NamedTuple):
    """What people call a statistic of `jaxgrad.analysis.STATISTICS`.

    Attributes:
        title: For headings.
        axis: For axes.
        definition: One sentence, plain text.
    """

    title: str
    axis: str
    definition: str


PROJECTION_STYLE: Mapping[str, Style] = MappingProxyType(
    {
        "q": Style("Q", BLUE, (), "o", "circle"),
        "k": Style("K", ORANGE, (5.0, 1.6), "s", "square"),
        "v": Style("V", GREEN, (1.4, 1.2), "^", "triangle-up"),
        "o": Style("O", VERMILION, (5.0, 1.4, 1.2, 1.4), "D", "diamond"),
        "gate": Style("gate", PURPLE, (8.0, 2.0), "v", "triangle-down"),
        "up": Style("up", SKY, (3.0, 1.2), "P", "cross"),
        "down": Style("down", BLACK, (5.0, 1.4, 1.2, 1.4, 1.2, 1.4), "X", "x"),
    }
)

STATISTIC_NAMES: Mapping[str, StatisticName] = MappingProxyType(
    {
        "nuclear_norm": StatisticName(
            "Nuclear norm",
            "nuclear norm",
            "Sum of the singular values of one example's gradient of the mean loss of its "
            "response tokens.",
        ),
        "sigma_ratio": StatisticName(
            "Share of the largest singular value",
            "σ₁ / nuclear norm",
            "Largest singular value over the nuclear norm: 1 where the gradient has rank one.",
        ),
        "effective_rank": StatisticName(
            "Effective rank",
            "effective rank",
            "exp of the entropy of the singular values, taken as shares of their sum: how many "
            "directions the gradient has.",
        ),
        "effective_rank_fraction": StatisticName(
            "Effective rank, share of its ceiling",
            "effective rank / ceiling",
            "Effective rank over the largest rank that the matrix and the number of tokens allow.",
        ),
        "loss_normalised_norm": StatisticName(
            "Nuclear norm per loss",
            "nuclear norm / loss",
            "Nuclear norm over the example's mean loss.",
        ),
        "sum_loss_norm": StatisticName(
            "Nuclear norm of the summed loss",
            "nuclear norm, summed loss",
            "Nuclear norm times the number of response tokens: that of the gradient of the summed "
            "loss.",
        ),
    }
)
