"""Attention with sinks in PyTorch. B batch, S positions, N query heads, M key-value heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BSND: Tensor,
    k_BSMD: Tensor,
    v_BSMD: Tensor,
    sinks_N: Tensor,
    scale: float,
    window: int | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """[B, S, N, D] in q's dtype; the softmax is float32, or float64 for float64 inputs."""
    length, groups = q_BSND.shape[1], q_BSND.shape[2] // k_BSMD.shape[2]
    k_BSND, v_BSND = (x.repeat_interleave(groups, dim=2) for x in (k_BSMD, v_BSMD))
    logits_BNST = torch.einsum("bsnd,btnd->bnst", q_BSND, k_BSND) * scale
    logits_BNST = logits_BNST.to(torch.promote_types(logits_BNST.dtype, torch.float32))
    distance = torch.arange(length, device=q_BSND.device)[:, None] - torch.arange(length, device=q_BSND.device)
    hidden = (distance < 0) | (distance >= (window or length))
    if bounds is not None:
        flat = torch.arange(q_BSND.shape[0] * length, device=q_BSND.device, dtype=bounds.dtype)
        document_BS = torch.bucketize(flat, bounds, right=True).view(-1, length)
        hidden = hidden | (document_BS[:, :, None] != document_BS[:, None, :])[:, None]
    logits_BNST = logits_BNST.masked_fill(hidden, float("-inf"))
    sinks = sinks_N.to(logits_BNST.dtype)[None, :, None, None].expand(*logits_BNST.shape[:3], 1)
    share_BNST = torch.cat((logits_BNST, sinks), -1).softmax(-1)[..., :-1]
    return torch.einsum("bnst,btnd->bsnd", share_BNST.to(v_BSND.dtype), v_BSND)
