"""RMS normalization at memory speed: each program holds one row. R rows, H hidden."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ossia.kernels.sizes import power_of_two


@triton.jit
def _forward(x, residual, weight, total, y, rstd, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    at = row * H + column
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        rounded = (value + tl.load(residual + at, mask=inside, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    tl.store(rstd + row, factor)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, (scale * (value * factor)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x, weight, rstd, grad_y, grad_total, grad_x, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    at = row * H + column
    factor = tl.load(rstd + row)
    normal = tl.load(x + at, mask=inside, other=0).to(tl.float32) * factor
    grad = tl.load(grad_y + at, mask=inside, other=0).to(tl.float32)
    grad *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    grad = factor * (grad - normal * (tl.sum(grad * normal, 0) / H))
    if grad_total is not None:
        grad += tl.load(grad_total + at, mask=inside, other=0).to(tl.float32)
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)


def _layout(x: Tensor) -> tuple[int, dict[str, int]]:
    """Rows of x, and how a program covers one: 2880 columns take 8 warps of 16 columns a thread."""
    block = power_of_two(x.shape[-1])
    return x.numel() // x.shape[-1], {"H": x.shape[-1], "BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def _normalize(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, which is x without a residual; y; float32 reciprocal root mean square [R])."""
    x, weight_H = x.contiguous(), weight_H.contiguous()
    rows, layout = _layout(x)
    y, rstd_R = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    if rows:
        _forward[(rows,)](x, residual, weight_H, total, y, rstd_R, eps, **layout)
    return x if total is None else total, y, rstd_R


def _gradient(ctx: Any, grad_y: Tensor, grad_total: Tensor | None) -> Tensor:
    """Gradient of what was normalized, [..., H] in its dtype, with `grad_total` added before it is rounded."""
    x, weight_H, rstd_R = ctx.saved_tensors
    rows, layout = _layout(x)
    grad_x = torch.empty_like(x)
    if grad_total is not None:
        grad_total = grad_total.contiguous()
    if rows:
        _backward[(rows,)](x, weight_H.contiguous(), rstd_R, grad_y.contiguous(), grad_total, grad_x, **layout)
    return grad_x


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x, y, rstd_R = _normalize(x, None, weight_H, eps)
        ctx.save_for_backward(x, weight_H, rstd_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grads[0], None), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, y, rstd_R = _normalize(x, residual, weight_H, eps)
        ctx.save_for_backward(total, weight_H, rstd_R)
        # The last layer's total goes nowhere: no zeros are made for its gradient.
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total, grad_y = grads
        grad = grad_total if grad_y is None else _gradient(ctx, grad_y, grad_total)
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """[..., H] in x's dtype; differentiable in x, once."""
    return _RmsNorm.apply(x, weight_H, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(total, y)`, both [..., H] in x's dtype; differentiable in x and residual, once."""
    return _AddRmsNorm.apply(x, residual, weight_H, eps)
