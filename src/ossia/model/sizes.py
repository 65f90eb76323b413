"""Configurations of gpt-oss's sizes, as far as shapes and memory go; known without a download."""

from __future__ import annotations

from typing import Any


def _sizes(layers: int, experts: int, **more: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "sliding_window": 128,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],
        **more,
    }


SIZES: dict[str, dict[str, Any]] = {
    "20b": _sizes(24, 32),
    "120b": _sizes(36, 128),
    "tiny": _sizes(
        2,
        4,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
    ),
}
"""`20b` and `120b` as openai/gpt-oss-20b and -120b have them, and a toy."""
