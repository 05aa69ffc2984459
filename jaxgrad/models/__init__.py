"""Models: one Flax decoder, its config, and the families that it can stand for. No file is read here."""

from jaxgrad.models.config import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.decoder import Decoder

__all__ = ["AttentionKind", "Decoder", "DecoderConfig", "Rope"]
