"""Measures training on this machine, with random weights at true size: no download."""
