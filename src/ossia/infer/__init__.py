"""Talking to a model: one reply at a time, or all rows of a file."""
