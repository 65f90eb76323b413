"""Rows: files, formats, tokens, batches, and what to show of them."""
