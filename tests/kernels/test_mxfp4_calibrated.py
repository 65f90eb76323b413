"""MXFP4 rounded for given inputs: outputs nearer than by nearest rounding, and every promise of the format kept."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels.mxfp4 import dequantize
from ossia.kernels.mxfp4.calibrated import quantize_calibrated
from ossia.kernels.mxfp4.search import quantize_search


def inputs(count: int, width: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Rows whose directions differ in size as activations' do, [count, width]; the directions are always the same."""
    draw = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    size = torch.arange(1, width + 1) ** -0.75
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * size @ basis).to(device)


def small_change(outputs: int, width: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """A weight on MXFP4's grid, and it after a change of 1 % and low rank, as an adapter makes it; [O, I]."""
    draw = torch.Generator().manual_seed(3)
    found = quantize_search(torch.randn(outputs, width, generator=draw) * 0.02)
    base = dequantize(found.blocks, found.scales, torch.float32)
    change = torch.randn(outputs, 4, generator=draw) @ inputs(4, width, seed=5)
    return base.to(device), (base + change * (0.01 * base.norm() / change.norm())).to(device)


def values(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize_calibrated(weight, gram), torch.float32)


def test_a_small_change_survives_on_other_inputs_of_the_same_kind(device):
    base, merged = small_change(64, 256, device)
    seen, other = inputs(1024, 256, 1, device), inputs(512, 256, 2, device)
    written = values(merged[None], (seen.T @ seen)[None])[0]
    found = quantize_search(merged)
    nearest = dequantize(found.blocks, found.scales, torch.float32)
    moved = (other @ (merged - base).T).norm()
    missed, nearest_missed = ((other @ (rounded - merged).T).norm() / moved for rounded in (written, nearest))
    assert nearest_missed > 0.9
    assert missed < 0.35


def test_equals_the_textbook_one_column_at_a_time():
    _, merged = small_change(8, 64)
    seen = inputs(200, 64, 1)
    gram = seen.T @ seen
    blocks, scales = quantize_calibrated(merged[None], gram[None])
    # Optimal brain surgery in float64: each column rounded, its error spread over the others by the inverse of what is
    # left of the damped Gram matrix (GPTQ, equations 2 and 3).
    weight, hessian = merged.double(), gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    grid = torch.cat((-grid, grid))
    want = torch.empty_like(weight)
    for column in range(64):
        unit = torch.exp2(scales[0, :, column // 32].double() - 127)
        nearest = (weight[:, column, None] / unit[:, None] - grid).abs().argmin(1)
        want[:, column] = grid[nearest] * unit
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (weight[:, column] - want[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    got = dequantize(blocks, scales, torch.float32)[0].double()
    # Equal but for columns whose value lies within rounding of a tie.
    assert (got != want).double().mean() < 0.01


def test_what_the_grid_holds_stays(device):
    base, _ = small_change(16, 96, device)
    seen = inputs(50, 96, 1, device)
    assert torch.equal(values(base[None], (seen.T @ seen)[None])[0], base)


def test_an_expert_without_inputs_is_rounded_to_the_nearest_and_others_do_not_care():
    _, merged = small_change(16, 64)
    seen = inputs(100, 64, 1)
    gram = torch.stack((seen.T @ seen, torch.zeros(64, 64)))
    both = quantize_calibrated(torch.stack((merged, merged)), gram)
    found = quantize_search(merged)
    assert torch.equal(both[0][1], found.blocks)
    assert torch.equal(both[1][1], found.scales)
    alone = quantize_calibrated(merged[None], gram[:1])
    assert torch.equal(both[0][0], alone[0][0])
    assert both[0].shape == (2, 16, 2, 16)
    assert both[1].shape == (2, 16, 2)


def test_fewer_inputs_than_columns_and_one_of_zeros():
    _, merged = small_change(16, 96)
    seen = inputs(5, 96, 1)
    seen[:, 3] = 0
    written = values(merged[None], (seen.T @ seen)[None])[0]
    assert written.isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_calibrated(torch.full((1, 2, 32), torch.nan), torch.eye(32)[None])
