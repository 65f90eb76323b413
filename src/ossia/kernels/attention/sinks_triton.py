"""What turns the answer of an attention without sinks into one with them, in one pass. D head size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.sizes import ceil_div

_POSITIONS = 64


@triton.jit
def _kernel(out, lse, sinks, S, N, out_b, out_n, out_s, D: tl.constexpr, POSITIONS: tl.constexpr):
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < S
    sink = tl.load(sinks + n).to(tl.float32)
    at_lse = lse + (b * N + n) * S + position
    own = tl.load(at_lse, mask=inside, other=0.0)
    high = tl.maximum(own, sink)
    total = high + tl.log(tl.exp(own - high) + tl.exp(sink - high))
    at = out + b * out_b + n * out_n + position[:, None].to(tl.int64) * out_s + tl.arange(0, D)[None, :]
    value = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32) * tl.exp(own - total)[:, None]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(at_lse, total, mask=inside)


def apply_sinks_(out_BNSD: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> None:
    """In place: `out · sigmoid(lse - sink)`, and `lse` with the sink in its sum.

    Args:
        out_BNSD: of any strides but D's, which is one, D a power of two.
        lse_BNS: float32, contiguous: log-sum-exp of each query's logits.
        sinks_N: contiguous, any float.
    """
    batch, heads, length, size = out_BNSD.shape
    grid = (ceil_div(length, _POSITIONS), heads, batch)
    strides = out_BNSD.stride()[:3]
    _kernel[grid](out_BNSD, lse_BNS, sinks_N, length, heads, *strides, D=size, POSITIONS=_POSITIONS, num_warps=4)
