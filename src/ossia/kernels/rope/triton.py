"""Rotary embedding at memory speed: each program turns some heads of one position.

B batch, S positions, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ossia.kernels.sizes import ceil_div, power_of_two


@triton.jit
def _turn(
    x,
    cos,
    sin,
    out,
    x_batch,
    x_position,
    x_head,
    angle_batch,
    out_batch,
    out_position,
    out_head,
    N: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACK: tl.constexpr,
):
    position, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # int64: the heads of a [B, N, S, D] tensor lie S * D apart.
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (head < N) & (column < HALF)

    angle = sequence * angle_batch + position * HALF + column
    c = tl.load(cos + angle, mask=column < HALF, other=0).to(tl.float32)
    s = tl.load(sin + angle, mask=column < HALF, other=0).to(tl.float32)
    if BACK:
        s = -s

    at = x + sequence * x_batch + position * x_position + head * x_head + column
    first = tl.load(at, mask=inside, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0).to(tl.float32)
    to = out + sequence * out_batch + position * out_position + head * out_head + column
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def turn(x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor, out_BSND: Tensor, back: bool = False) -> None:
    """Write x turned, or turned back, to `out`, which may be x; both of any strides but D's, which is one."""
    cos_BSD2, sin_BSD2 = cos_BSD2.contiguous(), sin_BSD2.contiguous()
    batch, length, heads, size = x_BSND.shape
    if not x_BSND.numel():
        return
    half = size // 2
    tile = {"HEADS": min(power_of_two(heads), 32), "COLUMNS": power_of_two(half)}
    _turn[(length, batch, ceil_div(heads, tile["HEADS"]))](
        x_BSND,
        cos_BSD2,
        sin_BSD2,
        out_BSND,
        *x_BSND.stride()[:3],
        length * half if cos_BSD2.shape[0] > 1 else 0,
        *out_BSND.stride()[:3],
        N=heads,
        HALF=half,
        BACK=back,
        **tile,
        # 32 heads of 64 take 2 warps, 16 pairs a thread.
        num_warps=min(max(tile["HEADS"] * tile["COLUMNS"] // 512, 1), 8),
    )


def _rotated(x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor, back: bool) -> Tensor:
    """x turned, or turned back: contiguous [B, S, N, D] in its dtype."""
    if x_BSND.stride(-1) != 1:
        x_BSND = x_BSND.contiguous()
    out_BSND = torch.empty(x_BSND.shape, dtype=x_BSND.dtype, device=x_BSND.device)
    turn(x_BSND, cos_BSD2, sin_BSD2, out_BSND, back)
    return out_BSND


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BSD2, sin_BSD2)
        return _rotated(x_BSND, cos_BSD2, sin_BSD2, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_BSD2, sin_BSD2 = ctx.saved_tensors
        return _rotated(grads[0], cos_BSD2, sin_BSD2, back=True), None, None


def rope(x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor) -> Tensor:
    """Contiguous [B, S, N, D] in x's dtype; differentiable in x, once."""
    return _Rope.apply(x_BSND, cos_BSD2, sin_BSD2)
