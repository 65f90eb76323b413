"""MXFP4 weights: 4-bit floats in blocks of 32 that share one power-of-two scale (OCP MX specification 1.0).

Contract, the same for every implementation in this folder:

`blocks` uint8 [..., rows, cols/32, 16] and `scales` uint8 [..., rows, cols/32] stand for a weight
[..., rows, cols]; this is how openai/gpt-oss stores its experts. A byte holds two E2M1 codes: the low nibble is the
even column, the high nibble the odd one. A code is sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3,
4, 6 and their negatives. A scale byte s is E8M0: 2^(s - 127) for s in 0..254, NaN for 255.

- `dequantize(blocks, scales, dtype, out)` is exact in bfloat16 and float32, apart from overflow to infinity where
  scale * code passes the dtype's range; other dtypes are rounded from float32.
- `quantize(weight)` takes the scale floor(log2(max |block|)) - 2, clamped to the range of E8M0, and rounds each
  value to the nearest code, ties to the even mantissa; values above 6 * scale become 6 * scale. A block of zeros
  gets scale byte 0. `quantize(dequantize(*quantize(w)))` equals `quantize(w)` byte for byte.
- `search.quantize_search(weight)` takes for each block the scale of least squared error, and tells both errors.
- `calibrated.quantize_calibrated(weight, gram)` rounds for given inputs, so that outputs change least, not weights.

`triton` serves bfloat16 on a GPU: the same values, but that those below 2^-126 may become 0. There blocks and scales
may rest in pinned host memory, where `out` is on the GPU: it reads them across the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.mxfp4 import reference
from ossia.kernels.mxfp4.reference import BLOCK, quantize

__all__ = ["BLOCK", "dequantize", "quantize"]


def dequantize(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Expand MXFP4 to `dtype`, by the fastest implementation for the device; see `reference.dequantize`."""
    regular = out is None or out.is_contiguous() or (out.ndim == 3 and out.stride(2) == 1)
    if (blocks if out is None else out).is_cuda and dtype == torch.bfloat16 and regular and HAS_TRITON:
        from ossia.kernels.mxfp4 import triton

        return triton.dequantize(blocks, scales, out)
    return reference.dequantize(blocks, scales, dtype, out)
