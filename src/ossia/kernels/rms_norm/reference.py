"""The contract of `ossia.kernels.rms_norm` in PyTorch alone, on any device. H hidden."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """[..., H] in x's dtype; differentiable in x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_H.detach() * normal).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(total, y)`, both [..., H] in x's dtype; differentiable in x and residual."""
    total = x if residual is None else x + residual
    return total, rms_norm(total, weight_H, eps)
