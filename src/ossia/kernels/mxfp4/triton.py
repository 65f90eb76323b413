"""MXFP4 to bfloat16 at memory speed: each program expands a run of bytes, two values a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 2048
# 2^126 undoes the exponent bias of a 2-bit exponent put into float32's field of 8: 126 = 127 - 1.
_REBIAS = tl.constexpr(8.507059173023462e37)


@triton.jit
def _expand(blocks, scales, out, count, BYTES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    inside = at < count
    byte = tl.load(blocks + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + at // 16, mask=inside, other=127).to(tl.int32)
    # A scale byte is the exponent field of a float32, but for 0, which stands for 2^-127, a subnormal.
    power = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
    # 255 is NaN in E8M0; as an exponent field it would be infinity.
    power = tl.where(scale == 255, float("nan"), power)
    low = (((byte & 8) << 28) | ((byte & 7) << 22)).to(tl.float32, bitcast=True) * _REBIAS * power
    high = (((byte & 0x80) << 24) | ((byte & 0x70) << 18)).to(tl.float32, bitcast=True) * _REBIAS * power
    to = first * 2 + tl.arange(0, 2 * BYTES)
    pairs = tl.interleave(low.to(tl.bfloat16), high.to(tl.bfloat16))
    tl.store(out + to, pairs, mask=to < 2 * count)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [..., rows, cols/32, 16], scales uint8 [..., rows, cols/32] -> bfloat16 [..., rows, cols]."""
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    out = torch.empty(shape, dtype=torch.bfloat16, device=blocks.device)
    count = blocks.numel()
    if count:
        _expand[(triton.cdiv(count, _BYTES),)](blocks.contiguous(), scales.contiguous(), out, count, BYTES=_BYTES)
    return out
