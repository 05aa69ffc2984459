"""Data: files -> examples -> token ids -> padded batches. NumPy; no JAX."""
