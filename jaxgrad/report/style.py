"""How projections look and what losses are called, in figures and on the page alike."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from zlib import crc32

from jaxgrad.results.losses import RESPONSE_MEAN, RESPONSE_SUM

# Okabe & Ito's palette: it can be told apart with every common kind of colour blindness. Their yellow is
# left out: it cannot be seen on white paper.
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

# Experts and parts have the colour of their projection and one of these each.
_DASHES = tuple(style.dash for style in PROJECTION_STYLE.values())
_MARKERS = tuple((style.marker, style.symbol) for style in PROJECTION_STYLE.values())


def style_of(word: str) -> Style:
    """The style of a matrix of a layer, by its address: "q", "up.3", "q.lora_A".

    The same word always has the same style. Two experts may look alike: there are more experts than dashes.
    """
    name, *rest = word.split(".")
    whole = PROJECTION_STYLE[name]
    if not rest:
        return whole
    number = sum(int(part) if part.isdigit() else crc32(part.encode()) for part in rest)
    marker, symbol = _MARKERS[number % len(_MARKERS)]
    dash = _DASHES[number % len(_DASHES)]
    return Style(" ".join((whole.title, *rest)), whole.colour, dash, marker, symbol)


def styles_of(words: Iterable[str]) -> dict[str, Style]:
    """The styles of several, each once, in the order of a layer."""
    return {word: style_of(word) for word in sorted(set(words), key=_in_layer)}


def _in_layer(word: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Sorts by projection, then numbers by size and before names."""
    name, *rest = word.split(".")
    parts = [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in rest]
    return list(PROJECTION_STYLE).index(name), parts


@dataclass(frozen=True)
class LossWords:
    """How texts speak of a loss.

    Attributes:
        phrase: After "the gradient of the": "mean loss of its response tokens".
        unit: Of its values; "" where it is not known here.
        measured: What a plain norm is called beside one whose length is taken out.
    """

    phrase: str
    unit: str
    measured: str


def loss_words(loss: str) -> LossWords:
    """The words for a loss, by its name in --loss."""
    if loss == RESPONSE_MEAN:
        return LossWords("mean loss of its response tokens", "nats per response token", "mean loss")
    if loss == RESPONSE_SUM:
        return LossWords("summed loss of its response tokens", "nats", "as measured")
    return LossWords(f"loss {loss}", "", "as measured")
