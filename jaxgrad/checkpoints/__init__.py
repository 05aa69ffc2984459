"""Checkpoints: reads model files of every format into a decoder with weights, and its tokenizer."""

from jaxgrad.checkpoints.load import Checkpoint, LoadedModel, load_model, open_checkpoint

__all__ = ["Checkpoint", "LoadedModel", "load_model", "open_checkpoint"]
