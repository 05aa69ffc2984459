"""Measure: a batch of examples -> losses and columns of numbers, compiled once a shape."""
