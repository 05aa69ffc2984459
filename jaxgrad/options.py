"""What to measure and how: everything that a run's numbers depend on besides its model and data.

The lists of choices stand here alone. Nothing here imports JAX, so that --help and bad flags do not wait
for it.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from jaxgrad.data.chat_template import uses_chat
from jaxgrad.data.passages import ProtocolName, Turns
from jaxgrad.data.tokens import Protocol, read_date
from jaxgrad.errors import UserError

if TYPE_CHECKING:
    from jaxgrad.gradients.selection import Selection

Method = Literal["auto", "factored", "dense"]
Precision = Literal["highest", "high", "default"]
Choice = Literal["auto", "yes", "no"]
Backend = Literal["cpu", "gpu", "tpu"]
DtypeName = Literal["float32", "bfloat16", "float64"]
METHODS: tuple[str, ...] = get_args(Method)
PRECISIONS: tuple[str, ...] = get_args(Precision)
CHOICES: tuple[str, ...] = get_args(Choice)
DTYPE_NAMES: tuple[str, ...] = get_args(DtypeName)
PROTOCOL_NAMES: tuple[str, ...] = get_args(ProtocolName)
TURNS: tuple[str, ...] = get_args(Turns)


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """What is measured of an example, and how; static under jit.

    Attributes:
        selection: which weights.
        method: "auto" (by factors or from the built matrix, whichever is cheaper, decided for each
            projection), "factored" (always by factors), "dense" (the weights' own gradients and SVDs).
        spectrum: keep the singular values.
        extremes: find the largest and smallest entry.
        similarity: take the cosines between the gradients of layers, and of partners in a layer.
        layerwise: reduce each layer inside the backward pass (see `measure.layerwise`): memory for one
            layer's factors, for a second forward pass; not with `similarity` or "dense".
        precision: of matrix products in the model.
        loss: whose gradient is taken, a name in `gradients.loss.LOSSES`.
        backend: the kind of device that programs are made for; it need not be this machine's.
    """

    selection: "Selection"
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    similarity: bool = False
    layerwise: bool = False
    precision: Precision = "highest"
    loss: str = "response_mean"
    backend: Backend = "cpu"


# Where --max_length is not given; the authors' number.
MOST_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What besides its path decides which weights a model has; every field stands behind a flag.

    Attributes:
        base_model_path: the model that an adapter is merged into; None for the one that the adapter names.
        adapter: whether the directory's adapter is used; "auto" means where it holds no whole weights.
        revision: branch, tag or commit of a hub id; None for its main branch.
    """

    base_model_path: str | None = None
    adapter: Choice = "auto"
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """What to measure and how; every field stands behind a flag of `bin/analyze`.

    Attributes:
        protocol: "paper" (the authors', to compare with) or "clean" (see `data.tokens`).
        chat: whether the chat template is used; "auto" means where the tokenizer has one.
        max_length: tokens after which an example is cut; None for `MOST_TOKENS`, or the model's positions
            where they are fewer.
        parameters: "attention", "mlp", "all", or a regular expression on the weights' names.
        layerwise: "auto" means where the memory is too small otherwise; see `MeasureSettings`.
        batch_tokens: padded tokens of a batch; None for the backend's default.
        date: YYYY-MM-DD, the day that chat templates print which ask for one; None for today, or for
            the day of the run that is continued.
        loss: whose gradient is taken; see `MeasureSettings`.
        turns: of a conversation, whether the loss is on the "last" turn of the assistant's or on "all".
    """

    protocol: ProtocolName = "paper"
    chat: Choice = "auto"
    max_length: int | None = None
    parameters: str = "attention"
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    similarity: bool = False
    layerwise: Choice = "auto"
    batch_tokens: int | None = None
    dtype: DtypeName = "float32"
    precision: Precision = "highest"
    date: str | None = None
    loss: str = "response_mean"
    turns: Turns = "last"

    def fitted_to(self, max_positions: int) -> "AnalyzeOptions":
        """The options with `max_length` settled for a model of so many positions.

        Raises:
            UserError: a `max_length` that was given exceeds them.
        """
        if self.max_length is None:
            return dataclasses.replace(self, max_length=min(MOST_TOKENS, max_positions))
        if self.max_length > max_positions:
            raise UserError(
                f"--max_length {self.max_length} exceeds the model's {max_positions} positions; give "
                f"--max_length={max_positions} or less, or leave it out"
            )
        return self

    def protocol_for(self, tokenizer: Any) -> Protocol:
        """How this tokenizer's examples become tokens; `max_length` is settled.

        Raises:
            UserError: an option that does not fit; see `Protocol` and `uses_chat`.
        """
        assert self.max_length is not None
        chat = uses_chat(tokenizer, self.chat)
        date = None if self.date is None else read_date(self.date)
        return Protocol(self.protocol, chat, self.max_length, date, self.turns)

    def identity(self) -> dict[str, Any]:
        """The options as a run's identity has them.

        An option that came after the first finished runs is left out at its default, so that these runs
        keep their identity.
        """
        asked = dataclasses.asdict(self)
        for name in _LATER_OPTIONS:
            if asked[name] == getattr(AnalyzeOptions, name):
                del asked[name]
        return asked


# Options that the runs of earlier versions do not have.
_LATER_OPTIONS = ("loss", "turns")


def with_later_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded options, and those that `AnalyzeOptions.identity` leaves out, at their defaults."""
    return {name: getattr(AnalyzeOptions, name) for name in _LATER_OPTIONS} | dict(recorded)
