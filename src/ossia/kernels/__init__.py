"""Tensors in, tensors out: one folder per kernel, each with its contract and a pure-PyTorch reference."""
