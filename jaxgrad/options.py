"""What to measure and how: everything that a run's numbers depend on besides its model and data."""

import dataclasses
from typing import Any, Literal

import jax

from jaxgrad.errors import UserError
from jaxgrad.gradients import select_parameters
from jaxgrad.models import DecoderConfig
from jaxgrad.reduction import MeasureSettings, Method
from jaxgrad.tokens import Protocol, read_date, uses_chat

# Padded tokens of a batch. On a CPU short examples share the reading of the weights; from 512 tokens on
# more rows gain nothing (BUILD_NOTES.md).
DEFAULT_BATCH_TOKENS = {"cpu": 512, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """What to measure and how; every field stands behind a flag of `bin/analyze`.

    Attributes:
        protocol: "paper" (the authors', to compare with) or "clean" (see `tokens`).
        chat: whether the chat template is used; "auto" means where the tokenizer has one.
        parameters: "attention", "mlp", "all", or a regular expression on the weights' names.
        layerwise: reduce each layer inside the backward pass, with memory for one layer's factors and
            a second forward pass; "auto" where the memory is too small otherwise.
        batch_tokens: padded tokens of a batch; None for the backend's default.
        date: YYYY-MM-DD, the day that chat templates print which ask for one; None for today, or for
            the day of the run that is continued.
    """

    protocol: Literal["paper", "clean"] = "paper"
    chat: Literal["auto", "yes", "no"] = "auto"
    max_length: int = 1024
    parameters: str = "attention"
    method: Method = "auto"
    spectrum: bool = False
    extremes: bool = False
    similarity: bool = False
    layerwise: Literal["auto", "yes", "no"] = "auto"
    batch_tokens: int | None = None
    dtype: str = "float32"
    precision: str = "highest"
    date: str | None = None

    def protocol_for(self, tokenizer: Any) -> Protocol:
        """How this tokenizer's examples become tokens.

        Raises:
            UserError: an option that does not fit; see `Protocol` and `uses_chat`.
        """
        chat = uses_chat(tokenizer, self.chat)
        date = None if self.date is None else read_date(self.date)
        return Protocol(self.protocol, chat, self.max_length, date)

    def settings_for(self, config: DecoderConfig) -> MeasureSettings:
        """What is measured of this model.

        Raises:
            UserError: `parameters` selects none of its weights, or what is asked for needs all layers
                at once while `layerwise` is "yes".
        """
        settings = MeasureSettings(
            selection=select_parameters(config, self.parameters),
            method=self.method,
            spectrum=self.spectrum,
            extremes=self.extremes,
            similarity=self.similarity,
            layerwise=self.layerwise == "yes",
            precision=self.precision,
        )
        if settings.layerwise and not settings.can_be_layerwise:
            raise UserError(
                "--layerwise=yes does not go with --similarity or --method=dense, which need all layers "
                "at once; give one or the other"
            )
        return settings

    @property
    def tokens_of_a_batch(self) -> int:
        """`batch_tokens`, or the backend's default."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return DEFAULT_BATCH_TOKENS[jax.default_backend()]
