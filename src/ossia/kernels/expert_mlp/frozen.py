"""A projection for all experts of a layer: its frozen weight, and an adapter of it.

E experts, I inputs, O outputs, r rank, R tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ossia.kernels.mxfp4 import dequantize


def padded(rank: int) -> int:
    """Columns of a tail: with 16 a row's stride stays a multiple of 16 values, where Triton moves 16 bytes at a time
    (measured on an H100: 2.9 instead of 1.6 TB/s)."""
    return -(-rank // 16) * 16


class Adapter(NamedTuple):
    """`a_EIr` [E, I, r] and `b_ErO` [E, r, O] of a projection, contiguous, float32 or the rows' dtype."""

    a_EIr: Tensor
    b_ErO: Tensor


class Frozen(NamedTuple):
    """MXFP4 `blocks` uint8 [E, O, I/32, 16] and `scales` uint8 [E, O, I/32], or floating `dense_EIO`, or `wide`: what
    `expand` made, kept for good, into which later calls write the adapter."""

    bias_EO: Tensor
    inputs: int
    blocks: Tensor | None = None
    scales: Tensor | None = None
    dense_EIO: Tensor | None = None
    wide: Tensor | None = None

    def experts(self, start: int, end: int) -> Frozen:
        """Some of the experts, as views."""
        some = (None if tensor is None else tensor[start:end] for tensor in self[2:])
        return Frozen(self.bias_EO[start:end], self.inputs, *some)

    def held(self, dtype: torch.dtype, a_EIr: Tensor | None, b_ErO: Tensor | None) -> Frozen:
        """The same, expanded beforehand."""
        return self if self.wide is not None else self._replace(wide=self.expand(dtype, a_EIr, b_ErO))

    def expand(self, dtype: torch.dtype, a_EIr: Tensor | None, b_ErO: Tensor | None) -> Tensor:
        """[E, O + R, I + R], R being r rounded up to 16: the weight, transposed, with B in the last columns and A in
        the last rows, transposed too.

        Rows of x with the tail `scale · x A` times its transpose are `x W + scale · (x A) B`. Rows of a gradient g with
        the tail `scale · g Bᵀ` times it are g through W and the adapter.
        """
        experts, outputs = self.bias_EO.shape
        tail = 0 if a_EIr is None else padded(a_EIr.shape[2])
        rows, columns = outputs + tail, self.inputs + tail
        if self.wide is not None and self.wide.dtype == dtype and self.wide.shape[1] >= rows:
            out = self.wide[:, :rows, :columns]
        else:
            out = torch.empty(experts, rows, columns, dtype=dtype, device=self.bias_EO.device)
            self._fill(out[:, :outputs, : self.inputs])
        if a_EIr is not None and b_ErO is not None:
            write_adapter(out, a_EIr, b_ErO)
        return out

    def _fill(self, out_EOI: Tensor) -> None:
        if self.blocks is not None and self.scales is not None:
            dequantize(self.blocks, self.scales, out_EOI.dtype, out_EOI)
        elif self.dense_EIO is not None:
            out_EOI.copy_(self.dense_EIO.transpose(1, 2))
        else:
            assert self.wide is not None
            out_EOI.copy_(self.wide[:, : out_EOI.shape[1], : out_EOI.shape[2]])


def write_adapter(wide_EXY: Tensor, a_EIr: Tensor, b_ErO: Tensor) -> None:
    """Fill the last rows and columns of [E, O + R, I + R] with Aᵀ, Bᵀ and zeros."""
    if wide_EXY.is_cuda:
        from ossia.kernels.expert_mlp.triton import write_adapter as written

        written(wide_EXY, a_EIr, b_ErO)
        return
    (_, inputs, rank), outputs = a_EIr.shape, b_ErO.shape[2]
    wide_EXY[:, :, inputs:].zero_()
    wide_EXY[:, :outputs, inputs : inputs + rank] = b_ErO.transpose(1, 2)
    wide_EXY[:, outputs : outputs + rank, :inputs] = a_EIr.transpose(1, 2)
    wide_EXY[:, outputs + rank :, :inputs].zero_()
