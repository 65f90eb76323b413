"""The experts' MLP as one differentiable step, with its own memory plan. Letters as in `triton`.

With u = `scale · x A`, backward of the second projection never needs its output: for a row with gradient g (before its
weight w), `p = g (W2 + scale · A2 B2)ᵀ` gives the gradient of the activations, w·p, and that of w itself,
`act · p + b2 · g`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ossia.kernels.expert_mlp.frozen import Adapter, Frozen
from ossia.kernels.expert_mlp.memory import Memory, is_recomputing
from ossia.kernels.expert_mlp.reference import Order
from ossia.kernels.expert_mlp.triton import Outer, combine, gather, outer, sort_by_expert, swiglu, swiglu_backward_
from ossia.kernels.grouped_linear import grouped_linear

_Pair = tuple[Tensor | None, Tensor | None]


def expert_mlp(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Frozen,
    down: Frozen,
    alpha: float,
    limit: float,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
    scale: float = 1.0,
    memory: Memory | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """[T, H] in hidden's dtype, with `residual` added where given.

    Its backward can run once, since it reuses what forward kept.

    Args:
        hidden_TH: contiguous, bfloat16 (float32 under Triton's interpreter).
        index_TK: int64, contiguous.
        weight_TK: float32, contiguous.
        gate_up_adapter, down_adapter: both or neither.
        residual_TH: contiguous.
    """
    adapters = (*(gate_up_adapter or (None, None)), *(down_adapter or (None, None)))
    options = (gate_up, down, alpha, limit, scale, memory or Memory())
    return _ExpertMlp.apply(hidden_TH, weight_TK, residual_TH, *adapters, index_TK, *options)


def _forward(rows: Tensor, weight: Frozen, adapter: _Pair, order: Order, memory: Memory, tail: int = 0) -> Tensor:
    """Rows [S, I + R] through weight and adapter: [S, O + tail], of which the last columns mean nothing."""
    outputs = weight.bias_EO.shape[1] + tail
    return _product(rows, weight, adapter, order, memory, outputs, lambda wide: wide[:, :outputs].transpose(1, 2))


def _backward(rows: Tensor, weight: Frozen, adapter: _Pair, order: Order, memory: Memory) -> Tensor:
    """Gradient rows [S, O + R] back through weight and adapter: [S, I]."""
    inputs = weight.inputs
    return _product(rows, weight, adapter, order, memory, inputs, lambda wide: wide[:, :, :inputs])


def _product(
    rows: Tensor,
    weight: Frozen,
    adapter: _Pair,
    order: Order,
    memory: Memory,
    columns: int,
    view: Callable[[Tensor], Tensor],
) -> Tensor:
    count = len(order.offsets_E)
    if weight.wide is not None or not 0 < memory.experts < count:
        return grouped_linear(rows, view(weight.expand(rows.dtype, *adapter)), order.offsets_E)
    ends = [0, *order.offsets_E.tolist()]
    out = rows.new_empty(len(rows), columns)
    for first in range(0, count, memory.experts):
        last = min(first + memory.experts, count)
        start, end = ends[first], ends[last]
        if end > start:
            some = (None if x is None else x[first:last] for x in adapter)
            wide = weight.experts(first, last).expand(rows.dtype, *some)
            out[start:end] = grouped_linear(rows[start:end], view(wide), order.offsets_E[first:last] - start)
            del wide
    return out


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_TK: Tensor,
        residual_TH: Tensor | None,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        index_TK: Tensor,
        gate_up: Frozen,
        down: Frozen,
        alpha: float,
        limit: float,
        scale: float,
        memory: Memory,
    ) -> Tensor:
        recompute = is_recomputing()
        if recompute and memory.keep and memory.reuse:
            gate_up = gate_up.held(hidden_TH.dtype, a1, b1)
        ctx.options = (gate_up, down, alpha, limit, scale, memory)
        order = sort_by_expert(index_TK, len(gate_up.bias_EO))
        kept: tuple[Tensor | None, Tensor | None] = (None, None)
        if memory.keep or not recompute:
            wide, thin, _ = gather(hidden_TH, order.order_S, order.offsets_E, index_TK.shape[1], a1, scale)
            gate_up_SX = _forward(wide, gate_up, (a1, b1), order, memory, thin.shape[1])
            del wide
            if memory.keep:
                kept = (gate_up_SX, thin)
        ctx.save_for_backward(hidden_TH, weight_TK, a1, b1, a2, b2, *order, *kept)
        if recompute:
            return torch.empty_like(hidden_TH)
        act_SX = swiglu(gate_up_SX, gate_up.bias_EO, order.offsets_E, alpha, limit, a2, scale)
        del gate_up_SX, kept
        out_SH = _forward(act_SX, down, (a2, b2), order, memory)
        del act_SX
        return combine(out_SH, order.position_TK, weight_TK, index_TK, down.bias_EO, residual_TH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.options is None:
            raise RuntimeError("backward of expert_mlp runs once: it reuses what forward kept")
        gate_up, down, alpha, limit, scale, memory = ctx.options
        ctx.options = None
        hidden_TH, weight_TK, a1, b1, a2, b2, order_S, position_TK, offsets_E, gate_up_SX, thin1 = ctx.saved_tensors
        order = Order(order_S, position_TK, offsets_E)
        top_k = weight_TK.shape[1]
        grad_TH = grads[0].contiguous()
        if gate_up_SX is None:
            if memory.reuse:
                gate_up = gate_up.held(hidden_TH.dtype, a1, b1)
            wide, thin1, _ = gather(hidden_TH, order_S, offsets_E, top_k, a1, scale)
            gate_up_SX = _forward(wide, gate_up, (a1, b1), order, memory, thin1.shape[1])
            del wide

        b2_EHr = None if b2 is None else b2.transpose(1, 2)
        wide, thin_g, biased_S = gather(grad_TH, order_S, offsets_E, top_k, b2_EHr, scale, down.bias_EO)
        back_SI = _backward(wide, down, (a2, b2), order, memory)
        del wide
        d_adapters: list[Tensor | None] = [None] * 4
        trained = None
        if a1 is not None and any(ctx.needs_input_grad[3:7]):
            d_a1, d_b1, d_a2, d_b2 = (torch.empty_like(x, dtype=torch.float32) for x in (a1, b1, a2, b2))
            trained = Outer(thin1, thin_g, d_b1.transpose(1, 2), d_a2)
        thin2, thin_d, d_weight_TK = swiglu_backward_(
            gate_up_SX, gate_up.bias_EO, order_S, offsets_E, back_SI, weight_TK, biased_S, alpha, limit, a2, b1, scale,
            trained,
        )  # fmt: skip
        del back_SI
        if trained is not None:
            outer(thin_d, hidden_TH, offsets_E, d_a1, order_S, top_k)
            outer(thin2, grad_TH, offsets_E, d_b2.transpose(1, 2), order_S, top_k, weight_TK)
            d_adapters = [d.to(x.dtype) for d, x in zip((d_a1, d_b1, d_a2, d_b2), (a1, b1, a2, b2), strict=True)]
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_rows_SH = _backward(gate_up_SX, gate_up, (a1, b1), order, memory)
            d_hidden = combine(d_rows_SH, position_TK)
        d_residual = grads[0] if ctx.needs_input_grad[2] else None
        return (d_hidden, d_weight_TK, d_residual, *d_adapters, *(None,) * 7)
