"""MXFP4 to bfloat16 at memory speed: each program expands a run of blocks, two values a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.sizes import ceil_div

_RUN = 128
# 2^126 undoes the exponent bias of a 2-bit exponent put into float32's field of 8: 126 = 127 - 1.
_REBIAS = tl.constexpr(8.507059173023462e37)


@triton.jit
def _expand(blocks, scales, out, count, out_e, out_r, ROWS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = block < count
    pair = tl.arange(0, 16)
    byte = tl.load(blocks + block[:, None] * 16 + pair[None, :], mask=inside[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + block, mask=inside, other=127).to(tl.int32)
    # A scale byte is the exponent field of a float32, but for 0, which stands for 2^-127, a subnormal.
    power = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    # 255 is NaN in E8M0; as an exponent field it would be infinity.
    power = tl.where(scale == 255, float("nan"), power)[:, None]
    low = (((byte & 8) << 28) | ((byte & 7) << 22)).to(tl.float32, bitcast=True) * _REBIAS * power
    high = (((byte & 0x80) << 24) | ((byte & 0x70) << 18)).to(tl.float32, bitcast=True) * _REBIAS * power
    row = block // WIDTH
    to = out + (row // ROWS) * out_e + (row % ROWS) * out_r + (block % WIDTH) * 32
    pairs = tl.interleave(low.to(tl.bfloat16), high.to(tl.bfloat16))
    tl.store(to[:, None] + tl.arange(0, 32)[None, :], pairs, mask=inside[:, None])


def dequantize(blocks: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """blocks uint8 [..., rows, cols/32, 16], scales uint8 [..., rows, cols/32] -> bfloat16 [..., rows, cols].

    `out` may be given: bfloat16 of that shape, of three dimensions, its columns of unit stride.
    """
    *groups, rows, width = scales.shape
    if out is None:
        out = torch.empty((*groups, rows, width * 32), dtype=torch.bfloat16, device=blocks.device)
    strides = out.stride()[-3:-1] if len(groups) == 1 else (rows * width * 32, width * 32)
    count = scales.numel()
    if count:
        _expand[(ceil_div(count, _RUN),)](
            blocks.contiguous(), scales.contiguous(), out, count, *strides, ROWS=rows, WIDTH=width, RUN=_RUN
        )
    return out
