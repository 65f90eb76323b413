"""MXFP4 with the scale of least error.

Besides the plain exponent of `quantize` only its two neighbours can be best for a block. In units of the plain scale
the largest value lies in [4, 8), and the plain codes are 0, 0.5, 1, 1.5, 2, 3, 4, 6.

- One higher adds 8 and nothing else that lies in this range, so it can win only where a value is nearer to 8 than to 6.
  Higher ones have no other values in this range than that.
- One lower adds 0.25 and 0.75 and ends at 3. It saves at most 31 * 0.25^2 < 2 on the other values, and costs 2 or
  more on a largest value from 4.5 on. Two lower ends at 1.5, which costs 6.25.

So most blocks are not tried again. N blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ossia.kernels.mxfp4.reference import BLOCK, dequantize, nearest_codes, quantize

_ONE = 127
"""Scale byte of 2^0."""
_LARGEST = 252
"""Scale byte above which 6 * scale passes float32's range."""
# Blocks handled at a time: a temporary of float32 takes 4 MiB, and 128 MiB on a GPU, where a chunk costs some 70
# launches and several waits whatever its size.
_CHUNK_BLOCKS = {"cpu": 1 << 15, "cuda": 1 << 20}


class Searched(NamedTuple):
    """`blocks` uint8 [..., rows, cols/32, 16], `scales` uint8 [..., rows, cols/32], and for each block the sum of its
    squared errors, float64 [..., rows, cols/32]: as returned, and of `quantize`."""

    blocks: Tensor
    scales: Tensor
    error: Tensor
    plain_error: Tensor


def quantize_search(weight: Tensor) -> Searched:
    """Round a weight to MXFP4, each block by the exponent that leaves the least squared error.

    weight floating [..., rows, cols], cols a multiple of 32. Codes are the nearest ones, as in `quantize`; of exponents
    that do equally well the plain one is kept, so what MXFP4 holds exactly comes out as from `quantize`. A scale that
    would overflow float32 is not taken. Raises ValueError as `quantize` does.
    """
    blocks, scales = quantize(weight)
    weight_N32, blocks_N16, scales_N = weight.detach().reshape(-1, BLOCK), blocks.view(-1, BLOCK // 2), scales.view(-1)
    error_N = torch.empty(len(scales_N), dtype=torch.float64, device=weight.device)
    plain_N = torch.empty_like(error_N)
    step = _CHUNK_BLOCKS.get(weight.device.type, _CHUNK_BLOCKS["cpu"])
    for start in range(0, len(scales_N), step):
        piece = slice(start, start + step)
        plain_N[piece], error_N[piece] = _improve(weight_N32[piece].float(), blocks_N16[piece], scales_N[piece])
    return Searched(blocks, scales, error_N.view_as(scales), plain_N.view_as(scales))


def _improve(weight_N32: Tensor, blocks_N16: Tensor, scales_N: Tensor) -> tuple[Tensor, Tensor]:
    """Change blocks and scales in place where another exponent is better; squared errors before and after."""
    power_N = scales_N.int() - _ONE
    scaled_N32 = torch.ldexp(weight_N32, -power_N.unsqueeze(-1))
    plain_N = _error(scaled_N32, blocks_N16, 0)
    error_N = plain_N.clone()
    top_N = scaled_N32.abs().amax(dim=-1)
    tries = ((-1, (top_N < 4.5) & (scales_N > 0)), (1, (top_N > 7) & (scales_N < _LARGEST)))
    for step, worth_N in tries:
        rows_M = worth_N.nonzero().squeeze(-1)
        tried_M32 = scaled_N32[rows_M]
        tried_M16 = nearest_codes(tried_M32 * 2.0**-step)
        tried_M = _error(tried_M32, tried_M16, step)
        better_M = tried_M < error_N[rows_M]
        rows_M = rows_M[better_M]
        blocks_N16[rows_M] = tried_M16[better_M]
        scales_N[rows_M] += step
        error_N[rows_M] = tried_M[better_M]
    unit_N = torch.exp2(2 * power_N.double())
    return plain_N * unit_N, error_N * unit_N


def _error(scaled_N32: Tensor, blocks_N16: Tensor, power: int) -> Tensor:
    """Sums of squared differences between values and codes times 2^power, float32 [N]."""
    scale_N1 = torch.full((len(blocks_N16), 1), _ONE + power, dtype=torch.uint8, device=blocks_N16.device)
    values_N32 = dequantize(blocks_N16.unsqueeze(1), scale_N1, torch.float32)
    return (values_N32 - scaled_N32).square_().sum(dim=-1)
