"""One Flax decoder for all model families, its config, and its split over devices. Reads no files."""

from jaxgrad.models.config import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.decoder import Decoder

__all__ = ["AttentionKind", "Decoder", "DecoderConfig", "Rope"]
