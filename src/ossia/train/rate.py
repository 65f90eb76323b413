"""How near a run comes to what its GPU could do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ossia.train.gpus import of_device


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in dense bfloat16 products; None for a card that isn't known."""
    gpu = of_device(device_name)
    return gpu.flops or None if gpu else None


def flops_per_token(model: dict[str, Any], length: float) -> float | None:
    """Work of a training step per token, without weight gradients of the base and without recomputing.

    Args:
        model: gpt-oss's config.json; other models: None.
        length: tokens of a row, on average.
    """
    if model.get("model_type") != "gpt_oss":
        return None
    attention, experts = _weights(model)
    weights = model["num_hidden_layers"] * (attention + experts) + model["hidden_size"] * model["vocab_size"]
    # Each weight is used forward and backward, 2 FLOP each; scores and sums forward once, backward twice.
    return 4.0 * weights + 3 * sum(_scores(model, length))


def flops_again(model: dict[str, Any], length: float, recompute: Sequence[str]) -> float:
    """Work per token of what backward makes again.

    Args:
        model: gpt-oss's config.json.
        length: tokens of a row, on average.
        recompute: what of each layer, as a plan says it.
    """
    attention, experts = _weights(model)
    layer = [2.0 * (attention + experts) + scores for scores in _scores(model, length)]
    parts = {"none": 0.0, "experts": 2.0 * experts * 2 / 3}
    return sum(parts.get(kind, whole) for kind, whole in zip(recompute, layer, strict=True))


def _weights(model: dict[str, Any]) -> tuple[int, int]:
    """Weights that a token meets in a layer: attention, experts."""
    hidden, head = model["hidden_size"], model.get("head_dim", 64)
    query, key = model["num_attention_heads"] * head, model["num_key_value_heads"] * head
    return hidden * (2 * query + 2 * key), model["num_experts_per_tok"] * 3 * hidden * model["intermediate_size"]


def _scores(model: dict[str, Any], length: float) -> list[float]:
    """Work per token of each layer's scores and sums, forward."""
    query = model["num_attention_heads"] * model.get("head_dim", 64)
    kinds = model.get("layer_types") or ["full_attention"] * model["num_hidden_layers"]
    full = length / 2
    return [4.0 * query * (full if kind == "full_attention" else min(model["sliding_window"], full)) for kind in kinds]
