"""MXFP4 rounded for the inputs that a weight meets, so that its outputs stay rather than its values.

Nearest rounding takes back every change that is smaller than half a step of the grid. Here many such changes together
turn some codes, so that the outputs move as they should:

- column by column, what rounding does to the outputs is made up for by the columns after it (GPTQ, arXiv:2210.17323),
  each block with the scale of least error as it comes up;
- then, for some rounds, each column takes the code that is best with all others as they are;
- what is missing of the outputs' mean goes to the bias, which is not rounded.

E experts, O outputs, I inputs, G = I / 32; J and K columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ossia.kernels.mxfp4.reference import BLOCK, dequantize, nearest_codes, nearest_values
from ossia.kernels.mxfp4.search import quantize_search

DAMPING = 0.01
"""Added to the spread's diagonal, in parts of its mean: what no input reached counts a little too."""
ROUNDS = 3
"""In which columns are chosen anew; later ones gained less than 2 % together on the demo's base."""


class Inputs(NamedTuple):
    """What experts were given, each input of some importance: the sum of importances float32 [E], the weighted mean
    [E, I], and the weighted sum of squares about it [E, I, I]. All zero for an expert that was given nothing."""

    weight_E: Tensor
    mean_EI: Tensor
    spread_EII: Tensor

    @classmethod
    def of(cls, rows: list[Tensor], importance: list[Tensor]) -> Inputs:
        """From each expert's inputs [N, I] and their importances [N]."""
        weight_E = torch.stack([each.sum() for each in importance])
        mean_EI = torch.stack([each_N @ rows_NI for each_N, rows_NI in zip(importance, rows, strict=True)])
        mean_EI /= weight_E.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        spreads = []
        for each_N, rows_NI, mean_I in zip(importance, rows, mean_EI, strict=True):
            centred_NI = (rows_NI - mean_I) * each_N.sqrt()[:, None]
            spreads.append(centred_NI.T @ centred_NI)
        return cls(weight_E, mean_EI, torch.stack(spreads))

    def moved(self, change_EOI: Tensor, shift_EO: Tensor | None = None) -> Tensor:
        """The weighted sum of squares of what a change of weights, and of biases, does to the outputs."""
        mean_EO = (change_EOI @ self.mean_EI[..., None]).squeeze(-1)
        if shift_EO is not None:
            mean_EO = mean_EO + shift_EO
        return ((change_EOI @ self.spread_EII) * change_EOI).sum() + (self.weight_E[:, None] * mean_EO.square()).sum()


class Calibrated(NamedTuple):
    """`blocks` uint8 [E, O, G, 16], `scales` uint8 [E, O, G], and what to add to the bias, float32 [E, O]."""

    blocks: Tensor
    scales: Tensor
    shift: Tensor


def quantize_calibrated(weight_EOI: Tensor, inputs: Inputs) -> Calibrated:
    """Round weights, floating [E, O, I] with I a multiple of 32, to MXFP4 so that outputs on the inputs stay.

    Raises ValueError as `quantize` does.
    """
    weight_EOI = weight_EOI.detach().float()
    spread_EII = _damped(inputs.spread_EII)
    rounded_EOI, scales_EOG = _spread_errors(weight_EOI, spread_EII)
    for _ in range(ROUNDS):
        _choose_anew(weight_EOI, rounded_EOI, scales_EOG, spread_EII)
    scaled_EOG32 = torch.ldexp(rounded_EOI.view(*scales_EOG.shape, BLOCK), 127 - scales_EOG.int().unsqueeze(-1))
    blocks = nearest_codes(scaled_EOG32.view(-1, BLOCK)).view(*scales_EOG.shape, BLOCK // 2)
    missing_EOI = weight_EOI - dequantize(blocks, scales_EOG, torch.float32)
    return Calibrated(blocks, scales_EOG, (missing_EOI @ inputs.mean_EI[..., None]).squeeze(-1))


def _damped(spread_EII: Tensor) -> Tensor:
    mean_E = spread_EII.diagonal(dim1=1, dim2=2).mean(-1)
    damped_EII = spread_EII.clone()
    damped_EII.diagonal(dim1=1, dim2=2).add_(torch.where(mean_E > 0, DAMPING * mean_E, 1.0)[:, None])
    return damped_EII


def _spread_errors(weight_EOI: Tensor, spread_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded values [E, O, I] and scales [E, O, G], each column's error spread over the columns after it."""
    carry_EII = _carry(spread_EII)
    left_EOI, rounded_EOI, scales = weight_EOI.clone(), torch.empty_like(weight_EOI), []
    for start in range(0, weight_EOI.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        block_EO32 = left_EOI[..., block].contiguous()
        scales.append(quantize_search(block_EO32).scales)
        grid = _Grid(scales[-1][..., 0])
        value_32EO, carry_JKE1 = _columns_first(block_EO32), _columns_first(carry_EII[:, block, block]).mT[..., None]
        rounded_32EO, error_32EO = torch.empty_like(value_32EO), torch.empty_like(value_32EO)
        for column in range(BLOCK):
            carry_32E1 = carry_JKE1[:, column]
            rounded_EO, error_EO = rounded_32EO[column], error_32EO[column]
            grid.nearest(value_32EO[column], rounded_EO)
            torch.sub(value_32EO[column], rounded_EO, out=error_EO).div_(carry_32E1[column])
            value_32EO[column + 1 :].addcmul_(carry_32E1[column + 1 :], error_EO, value=-1)
        rounded_EOI[..., block] = rounded_32EO.permute(1, 2, 0)
        left_EOI[..., block.stop :] -= error_32EO.permute(1, 2, 0) @ carry_EII[:, block, block.stop :]
    return rounded_EOI, torch.cat(scales, -1)


def _carry(spread_EII: Tensor) -> Tensor:
    """Upper R with Rᵀ R = inverse of the spread: row i says how an error in column i spreads.

    Cholesky from the last row up, so that what is inverted is a triangle and no product of two. One by one: batched,
    cuSOLVER and cuBLAS take what they have for small matrices.
    """
    one_II = torch.eye(spread_EII.shape[-1], device=spread_EII.device)
    uppers = (torch.linalg.cholesky(spread_II.flip(0, 1)).flip(0, 1) for spread_II in spread_EII)
    return torch.stack([torch.linalg.solve_triangular(upper_II, one_II, upper=True) for upper_II in uppers])


def _choose_anew(weight_EOI: Tensor, rounded_EOI: Tensor, scales_EOG: Tensor, spread_EII: Tensor) -> None:
    """Each column in turn takes the codes that are best with the others as they are; in place."""
    pull_EOI = (rounded_EOI - weight_EOI) @ spread_EII
    for group in range(scales_EOG.shape[-1]):
        block = slice(group * BLOCK, (group + 1) * BLOCK)
        grid = _Grid(scales_EOG[..., group])
        pull_32EO, rounded_32EO = _columns_first(pull_EOI[..., block]), _columns_first(rounded_EOI[..., block])
        spread_JKE1 = _columns_first(spread_EII[:, block, block]).mT[..., None]
        chosen_32EO, turned_32EO = torch.empty_like(rounded_32EO), torch.empty_like(rounded_32EO)
        for column in range(BLOCK):
            spread_32E1 = spread_JKE1[:, column]
            chosen_EO, turned_EO = chosen_32EO[column], turned_32EO[column]
            best_EO = torch.addcdiv(rounded_32EO[column], pull_32EO[column], spread_32E1[column], value=-1)
            grid.nearest(best_EO, chosen_EO)
            torch.sub(chosen_EO, rounded_32EO[column], out=turned_EO)
            pull_32EO[column + 1 :].addcmul_(spread_32E1[column + 1 :], turned_EO)
        rounded_EOI[..., block] = chosen_32EO.permute(1, 2, 0)
        pull_EOI += turned_32EO.permute(1, 2, 0) @ spread_EII[:, block]


class _Grid:
    """The values that codes hold at some scales, a byte each."""

    def __init__(self, scales: Tensor) -> None:
        power = scales.int() - 127
        self._unit, self._inverse = (
            torch.ldexp(torch.ones_like(power, dtype=torch.float32), p) for p in (power, -power)
        )

    def nearest(self, value: Tensor, out: Tensor) -> None:
        torch.mul(nearest_values(value * self._inverse), self._unit, out=out)


def _columns_first(values: Tensor) -> Tensor:
    """[a, b, 32] → [32, a, b], so that a column is whole in memory: the loops over columns are long."""
    return values.permute(2, 0, 1).contiguous()
