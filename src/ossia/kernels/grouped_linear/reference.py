"""Grouped products in PyTorch. S rows sorted by group, E groups, I inputs, O outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.kernels.mxfp4 import dequantize


def grouped_linear(x_SI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, O] in x's dtype; differentiable in both.

    Args:
        x_SI: rows sorted by group, float32 or bfloat16.
        weight_EIO: one matrix per group, x's dtype.
        offsets_E: int32 end of each group's rows; the last is S.
    """
    if x_SI.is_cuda and x_SI.dtype == torch.bfloat16 and _is_aligned(x_SI) and _is_aligned(weight_EIO):
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    # An empty group still takes part with no rows, so that its weight gets a gradient of zeros.
    parts = [x_SI[a:b] @ weight_EIO[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    return torch.cat(parts)


def _is_aligned(x: Tensor) -> bool:
    """Whether rows (or columns, of a transposed matrix) start at multiples of 16 bytes, as `grouped_mm` asks for."""
    return max(x.stride()[-2:]) * x.element_size() % 16 == 0


def grouped_linear_mxfp4(x_SI: Tensor, blocks: Tensor, scales: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, O] in x's dtype; differentiable in x.

    Args:
        x_SI: rows sorted by group, float32 or bfloat16.
        blocks: uint8 [E, O, I/32, 16]; scales: uint8 [E, O, I/32] (see `ossia.kernels.mxfp4`).
        offsets_E: int32 end of each group's rows.
    """
    return _GroupedLinearMxfp4.apply(x_SI, blocks, scales, offsets_E)


class _GroupedLinearMxfp4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, blocks: Tensor, scales: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, scales, offsets_E)
        return grouped_linear(x_SI, _expanded(blocks, scales, x_SI).transpose(1, 2), offsets_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scales, offsets_E = ctx.saved_tensors
        grad_SO = grads[0].contiguous()
        return grouped_linear(grad_SO, _expanded(blocks, scales, grad_SO), offsets_E), None, None, None


def _expanded(blocks: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """[E, O, I] where the rows are, which blocks in pinned host memory are not."""
    if blocks.device == like.device:
        return dequantize(blocks, scales, like.dtype)
    out = torch.empty(*blocks.shape[:2], blocks.shape[2] * 32, dtype=like.dtype, device=like.device)
    return dequantize(blocks, scales, like.dtype, out)
