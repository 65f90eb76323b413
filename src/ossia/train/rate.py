"""How near a run comes to what its GPU could do."""

from __future__ import annotations

from typing import Any

_PEAKS = (
    ("B300", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX PRO 6000", 504.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 155.0),
    ("RTX 5090", 210.0),
    ("RTX 4090", 165.0),
    ("RTX 4080", 97.0),
    ("RTX 3090", 71.0),
)
"""Dense bfloat16 products, TFLOP/s, from the makers' data sheets; the first name found in the device's counts."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in dense bfloat16 products; None for a card that isn't known."""
    return next((peak * 1e12 for name, peak in _PEAKS if name in device_name), None)


def flops_per_token(model: dict[str, Any], length: float) -> float | None:
    """Work of a training step per token, without weight gradients of the base and without recomputing.

    Args:
        model: gpt-oss's config.json; other models: None.
        length: tokens of a row, on average.
    """
    if model.get("model_type") != "gpt_oss":
        return None
    hidden, head = model["hidden_size"], model.get("head_dim", 64)
    query, key = model["num_attention_heads"] * head, model["num_key_value_heads"] * head
    attention = hidden * (2 * query + 2 * key)
    experts = model["num_experts_per_tok"] * 3 * hidden * model["intermediate_size"]
    layers = model["num_hidden_layers"]
    weights = layers * (attention + experts) + hidden * model["vocab_size"]
    windows = model.get("layer_types") or ["full_attention"] * layers
    seen = sum(length / 2 if kind == "full_attention" else min(model["sliding_window"], length / 2) for kind in windows)
    # Each weight is used forward and backward, 2 FLOP each; scores and sums forward once, backward twice.
    return 4.0 * weights + 3 * 4.0 * query * seen
