"""Attention with sinks on PyTorch's FlashAttention, exact in both directions.

FlashAttention knows no sinks, but its parts do the job. Forward: with the log-sum-exp of the real logits, the answer is
`out · sigmoid(lse - sink)`. Backward: its kernel recomputes the shares as `exp(logit - lse)` and the correction as
`grad · out`. Given the log-sum-exp *with* the sink and the answer *with* the sink, both are those of the softmax over
logits and sink, so the gradients it returns are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ossia.kernels.attention.sinks import apply_sinks_

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def attention(
    q_BSND: Tensor,
    k_BSMD: Tensor,
    v_BSMD: Tensor,
    sinks_N: Tensor,
    scale: float,
    window: int | None = None,
    bounds: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """[B, S, N, D] bfloat16, from bfloat16 tensors on a GPU; sinks in any float.

    `longest` is the length of the longest document, needed with `bounds`: reading it from them would wait for the GPU.
    """
    if bounds is None:
        return _FlashSinks.apply(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window, None, q_BSND.shape[1])
    assert longest is not None, "bounds need the longest document's length"
    flat = (x.flatten(0, 1) for x in (q_BSND, k_BSMD, v_BSMD))
    return _FlashSinks.apply(*flat, sinks_N, scale, window, bounds, longest).view_as(q_BSND)


class _FlashSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_N: Tensor,
        scale: float,
        window: int | None,
        bounds: Tensor | None,
        length: int,
    ) -> Tensor:
        left = None if window is None or window >= length else window - 1
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": None if left is None else 0}
        out, lse, rng, unused, _ = _forward(q, k, v, bounds, bounds, length, length, 0.0, True, False, **ctx.options)
        # With bounds, out is [B·S, N, D] and lse [N, B·S].
        apply_sinks_(*_batched(out, lse), sinks_N)
        ctx.length = length
        ctx.save_for_backward(q, k, v, out, lse, rng, unused, bounds)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, rng, unused, bounds = ctx.saved_tensors
        last = (bounds, bounds, ctx.length, ctx.length, 0.0, True, rng, unused)
        gradients = _backward(grads[0].contiguous(), q, k, v, out, lse, *last, **ctx.options)
        return (*gradients, None, None, None, None, None)


def _batched(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, N, S, D] and [B, N, S], of one row where documents were packed."""
    views = out.transpose(-2, -3), lse
    return views if out.dim() == 4 else (views[0][None], views[1][None])
