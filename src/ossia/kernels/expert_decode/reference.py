"""The contract of `ossia.kernels.expert_decode` in PyTorch, on any device. Letters as in `expert_mlp.reference`."""

from __future__ import annotations

import functools

from torch import Tensor

from ossia.kernels import expert_mlp
from ossia.kernels.expert_mlp import Adapter, Frozen
from ossia.kernels.grouped_linear import grouped_linear


def expert_decode(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Frozen,
    down: Frozen,
    alpha: float,
    limit: float,
    residual_TH: Tensor,
    adapters: tuple[Adapter, Adapter] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of each token's experts, weighted, and of `residual`: [T, H] in hidden's dtype.

    Args:
        hidden_TH: float32 or bfloat16.
        index_TK: int64 experts of each token.
        weight_TK: their weights, float32.
        gate_up, down: the frozen projections.
        alpha, limit: of the activation.
        residual_TH: in hidden's dtype.
        adapters: of both projections, in hidden's dtype.
        scale: of the adapters.
    """
    first, second = (functools.partial(_delta, adapter, scale) for adapter in adapters) if adapters else (None, None)
    out_TH = expert_mlp.reference(hidden_TH, index_TK, weight_TK, gate_up, down, alpha, limit, first, second)
    return residual_TH + out_TH


def _delta(adapter: Adapter, scale: float, rows: Tensor, offsets_E: Tensor) -> Tensor:
    return grouped_linear(grouped_linear(rows, adapter.a_EIr, offsets_E) * scale, adapter.b_ErO, offsets_E)
