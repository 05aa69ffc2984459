"""Checkpoints: from files of any kind to a decoder with its weights, and its tokenizer."""

from jaxgrad.checkpoints.load import Checkpoint, LoadedModel, load_model, open_checkpoint

__all__ = ["Checkpoint", "LoadedModel", "load_model", "open_checkpoint"]
