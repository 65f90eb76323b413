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

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def attention(
    q_BSND: Tensor, k_BSMD: Tensor, v_BSMD: Tensor, sinks_N: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """[B, S, N, D] bfloat16, from bfloat16 tensors on a GPU; sinks in any float."""
    return _FlashSinks.apply(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window)


class _FlashSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSND: Tensor, k_BSMD: Tensor, v_BSMD: Tensor, sinks_N: Tensor, scale: float, window: int | None
    ) -> Tensor:
        length = q_BSND.shape[1]
        left = None if window is None or window >= length else window - 1
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": None if left is None else 0}
        out, lse_BNS, rng, unused, _ = _forward(
            q_BSND, k_BSMD, v_BSMD, None, None, length, length, 0.0, True, False, **ctx.options
        )
        sinks = sinks_N.float()[None, :, None]
        share_BNS = torch.sigmoid(lse_BNS - sinks)
        out = out * share_BNS.transpose(1, 2)[..., None].to(out.dtype)
        ctx.save_for_backward(q_BSND, k_BSMD, v_BSMD, out, torch.logaddexp(lse_BNS, sinks), rng, unused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, rng, unused = ctx.saved_tensors
        length = q.shape[1]
        gradients = _backward(
            grads[0].contiguous(), q, k, v, out, lse, None, None, length, length, 0.0, True, rng, unused, **ctx.options
        )
        return (*gradients, None, None, None)
