"""Rows of a pinned table, read by the GPU itself: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.sizes import power_of_two


@triton.jit
def _rows(table, index, out, H: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    source = tl.load(index + row).to(tl.int64)
    value = tl.load(table + source * H + column, mask=column < H)
    tl.store(out + row * H + column, value, mask=column < H)


def host_rows(table_VH: Tensor, index: Tensor) -> Tensor:
    """As the contract says; the table's memory must be within the GPU's reach (pinned)."""
    width = table_VH.shape[1]
    out = torch.empty(*index.shape, width, dtype=table_VH.dtype, device=index.device)
    if index.numel():
        _rows[(index.numel(),)](table_VH, index.contiguous(), out, H=width, COLUMNS=power_of_two(width))
    return out
