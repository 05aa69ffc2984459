"""Gradients: which weights, of which loss, as factors or as matrices."""
