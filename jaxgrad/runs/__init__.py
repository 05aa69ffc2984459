"""Runs: one plan, its windows, and the session that executes it."""
