"""RMS normalization by a frozen weight, alone or of a sum that the residual stream goes on with.

Contract, the same for every implementation in this folder; H is the hidden size:

- `rms_norm(x, weight_H, eps)` is `(weight * (x * rsqrt(mean(x²) + eps))).to(x.dtype)` along the last axis, as
  transformers' `GptOssRMSNorm`: one rounding, at the end.
- `add_rms_norm(x, residual, weight_H, eps)` is `(total, rms_norm(total, ...))` with `total = x + residual` rounded to
  x's dtype before it is normalized. x and residual receive one gradient, that of `total` as a whole. Without a residual
  `total` is x: what goes on beside the norm adds to its gradient in the norm's own pass.

Sums and products are float32 (float64 for float64 inputs). The weight may have another dtype than x; it gets no
gradient.

`triton` makes one pass over memory in each direction and keeps x (or total) and one float32 per row for the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """[..., H] in x's dtype, by the fastest implementation for the device; differentiable in x.

    Args:
        x: floating [..., H].
        weight_H: frozen scale, any floating dtype.
        eps: added to the mean square.
    """
    _check(x, weight_H)
    if _takes_triton(x):
        from ossia.kernels.rms_norm import triton

        return triton.rms_norm(x, weight_H, eps)
    return reference.rms_norm(x, weight_H, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(total, y)`, both [..., H] in x's dtype, differentiable in x and residual; `rms_norm` says the rest.

    `residual` has x's shape and dtype.
    """
    _check(x, weight_H)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be like x, {list(x.shape)} {x.dtype}; got {list(residual.shape)} {residual.dtype}"
        )
    if _takes_triton(x):
        from ossia.kernels.rms_norm import triton

        return triton.add_rms_norm(x, residual, weight_H, eps)
    return reference.add_rms_norm(x, residual, weight_H, eps)


def _takes_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and HAS_TRITON


def _check(x: Tensor, weight_H: Tensor) -> None:
    if weight_H.shape != x.shape[-1:]:
        raise ValueError(f"expected x [..., H] with weight [H], got {list(x.shape)} and {list(weight_H.shape)}")
