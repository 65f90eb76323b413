"""MXFP4 rounded for the inputs that a weight meets: what rounding one column does to the outputs, the columns after it
make up for as far as they can (GPTQ, arXiv:2210.17323); each block's scale is the one of least error as it comes up.

Nearest rounding takes back every change that is smaller than half a step of the grid. Here many such changes together
turn some codes, so that the outputs move as they should. E experts, O outputs, I inputs, G = I / 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.kernels.mxfp4.reference import BLOCK, nearest_codes, nearest_values
from ossia.kernels.mxfp4.search import quantize_search

DAMPING = 0.01
"""Added to the Gram matrix's diagonal, in parts of its mean: what no input reached counts a little too."""


def quantize_calibrated(weight_EOI: Tensor, gram_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to MXFP4 so that their outputs on given inputs change little.

    weight floating [E, O, I], I a multiple of 32; gram float32 [E, I, I], the sum of x xᵀ over the inputs of each
    expert, zero where it met none -> blocks uint8 [E, O, G, 16] and scales uint8 [E, O, G]. Raises ValueError as
    `quantize` does.
    """
    weight_EOI = weight_EOI.detach().to(torch.float32, copy=True)
    carry_EII = _carry(gram_EII)
    all_blocks, all_scales = [], []
    for start in range(0, weight_EOI.shape[-1], BLOCK):
        end = start + BLOCK
        block_EO32 = weight_EOI[..., start:end].contiguous()
        scales_EO1 = quantize_search(block_EO32).scales
        power_EO1 = scales_EO1.int() - 127
        error_EO32 = torch.empty_like(block_EO32)
        for column in range(BLOCK):
            at = start + column
            value_EO1 = block_EO32[..., column : column + 1]
            rounded_EO1 = torch.ldexp(nearest_values(torch.ldexp(value_EO1, -power_EO1)), power_EO1)
            error_EO1 = (value_EO1 - rounded_EO1) / carry_EII[:, at, at, None, None]
            block_EO32[..., column + 1 :] -= error_EO1 * carry_EII[:, at, None, at + 1 : end]
            error_EO32[..., column : column + 1] = error_EO1
        weight_EOI[..., end:] -= error_EO32 @ carry_EII[:, start:end, end:]
        codes_N16 = nearest_codes(torch.ldexp(block_EO32, -power_EO1).view(-1, BLOCK))
        all_blocks.append(codes_N16.view(*scales_EO1.shape, BLOCK // 2))
        all_scales.append(scales_EO1)
    return torch.cat(all_blocks, 2), torch.cat(all_scales, 2)


def _carry(gram_EII: Tensor) -> Tensor:
    """The upper R of Rᵀ R = the damped Gram matrix's inverse: row i says how an error in column i spreads."""
    mean_E = gram_EII.diagonal(dim1=1, dim2=2).mean(-1)
    damp_E = torch.where(mean_E > 0, DAMPING * mean_E, 1.0)
    damped_EII = gram_EII.clone()
    damped_EII.diagonal(dim1=1, dim2=2).add_(damp_E[:, None])
    # Cholesky from the last row up, so that what is inverted is a triangle and no product of two.
    upper_EII = torch.linalg.cholesky(damped_EII.flip(1, 2)).flip(1, 2)
    one_II = torch.eye(gram_EII.shape[-1], device=gram_EII.device)
    return torch.linalg.solve_triangular(upper_EII, one_II.expand_as(upper_EII), upper=True)
