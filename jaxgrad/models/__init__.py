"""Models: one Flax decoder, its config, the families that it can stand for, and checkpoint reading.

`config` (what a decoder is) -> `attention`, `decoder` (the module) -> `families` (Hugging Face config
and key table, as data) -> `sources` (safetensors directory, GGUF file: names to arrays) -> `fill`
(arrays into the module) -> `places`, `load` (all of these together).
"""

from jaxgrad.models.config import AttentionKind, DecoderConfig, Rope
from jaxgrad.models.decoder import Decoder
from jaxgrad.models.load import Checkpoint, LoadedModel, load_model, open_checkpoint

__all__ = [
    "AttentionKind",
    "Checkpoint",
    "Decoder",
    "DecoderConfig",
    "LoadedModel",
    "Rope",
    "load_model",
    "open_checkpoint",
]
