"""The experts' MLP in PyTorch. T tokens, K experts a token, S = T·K rows sorted by expert, E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ossia.kernels.expert_mlp.frozen import Frozen
from ossia.kernels.grouped_linear import grouped_linear, grouped_linear_mxfp4

Delta = Callable[[Tensor, Tensor], Tensor]
"""`(rows, offsets) -> rows` to add to a projection's output."""


class Order(NamedTuple):
    """Rows sorted by expert: int64 `order_S` (row s is token `order[s] // K`), `position_TK` (its inverse), int32
    `offsets_E` (end of each expert's rows)."""

    order_S: Tensor
    position_TK: Tensor
    offsets_E: Tensor


def sort_by_expert(index_TK: Tensor, experts: int) -> Order:
    """The order of rows for experts `index_TK`, int64."""
    expert_S, order_S = index_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(experts, device=expert_S.device)
    offsets_E = torch.searchsorted(expert_S, numbers_E, right=True, out_int32=True)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return Order(order_S, position_S.view_as(index_TK), offsets_E)


def expert_mlp(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Frozen,
    down: Frozen,
    alpha: float,
    limit: float,
    gate_up_delta: Delta | None = None,
    down_delta: Delta | None = None,
) -> Tensor:
    """[T, H] in hidden's dtype.

    Args:
        hidden_TH: float32 or bfloat16.
        index_TK: int64 experts of each token.
        weight_TK: their weights.
        gate_up_delta, down_delta: what an adapter adds to each projection.
    """
    order_S, position_TK, offsets_E = sort_by_expert(index_TK, len(gate_up.bias_EO))
    expert_S = index_TK.flatten()[order_S]
    rows_SH = hidden_TH[order_S // index_TK.shape[1]]
    gate_up_S = _project(rows_SH, gate_up, expert_S, offsets_E, gate_up_delta)
    act_SI = swiglu(gate_up_S, alpha, limit)
    out_TKH = _project(act_SI, down, expert_S, offsets_E, down_delta)[position_TK]
    return (out_TKH.float() * weight_TK[..., None].float()).sum(1).to(hidden_TH.dtype)


def swiglu(gate_up_S: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's clamped SwiGLU of rows whose gates and ups alternate: [..., 2 I] -> [..., I], same dtype."""
    gate, up = gate_up_S[..., 0::2].float(), gate_up_S[..., 1::2].float()
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(gate_up_S.dtype)


def _project(rows: Tensor, weight: Frozen, expert_S: Tensor, offsets_E: Tensor, delta: Delta | None) -> Tensor:
    if weight.blocks is not None and weight.scales is not None:
        out = grouped_linear_mxfp4(rows, weight.blocks, weight.scales, offsets_E)
    else:
        dense_EIO = weight.dense_EIO
        if dense_EIO is None:
            dense_EIO = weight.expand(rows.dtype, None, None).transpose(1, 2)
        out = grouped_linear(rows, dense_EIO.to(rows.dtype), offsets_E)
    if delta is not None:
        out = out + delta(rows, offsets_E)
    return out + weight.bias_EO.to(out.dtype)[expert_S]
