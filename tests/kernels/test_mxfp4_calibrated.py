"""MXFP4 rounded for given inputs: outputs nearer than by nearest rounding, and every promise of the format kept."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels.mxfp4 import calibrated, dequantize
from ossia.kernels.mxfp4.calibrated import Inputs, quantize_calibrated
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


def of(*rows: torch.Tensor) -> Inputs:
    """Inputs of as many experts, all of the same importance."""
    return Inputs.of(list(rows), [torch.ones(len(each), device=each.device) for each in rows])


def test_a_small_change_survives_on_other_inputs_of_the_same_kind(device):
    base, merged = small_change(64, 256, device)
    seen, other = (inputs(count, 256, seed, device) + 0.05 for count, seed in ((1024, 1), (512, 2)))
    blocks, scales, shift = quantize_calibrated(merged[None], of(seen))
    written = dequantize(blocks, scales, torch.float32)[0]
    found = quantize_search(merged)
    nearest = dequantize(found.blocks, found.scales, torch.float32)
    moved = (other @ (merged - base).T).norm()
    missed = (other @ (written - merged).T + shift[0]).norm() / moved
    nearest_missed = (other @ (nearest - merged).T).norm() / moved
    assert nearest_missed > 0.9
    assert missed < 0.3


def test_what_is_said_to_be_lost_is_so():
    _, merged = small_change(16, 64)
    seen, importance = inputs(100, 64, 1) + 0.3, torch.rand(100)
    known = Inputs.of([seen], [importance])
    blocks, scales, shift = quantize_calibrated(merged[None], known)
    change = dequantize(blocks, scales, torch.float32) - merged
    for more in (None, shift):
        out = seen @ change[0].T + (0 if more is None else more[0])
        want = (importance[:, None] * out.square()).sum()
        torch.testing.assert_close(known.moved(change, more), want, rtol=1e-4, atol=0)
    # No other shift does better.
    best = known.moved(change, shift)
    assert all(known.moved(change, shift + step * torch.randn_like(shift)) > best for step in (1e-3, -1e-2))


def test_every_round_of_new_choices_is_nearer(monkeypatch):
    _, merged = small_change(32, 128)
    known = of(inputs(300, 128, 1))
    missed = []
    for rounds in range(4):
        monkeypatch.setattr(calibrated, "ROUNDS", rounds)
        blocks, scales, shift = quantize_calibrated(merged[None], known)
        missed.append(float(known.moved(dequantize(blocks, scales, torch.float32) - merged, shift)))
    assert missed == sorted(missed, reverse=True)
    assert missed[3] < 0.95 * missed[0]


def test_equals_the_textbook_one_column_at_a_time(monkeypatch):
    monkeypatch.setattr(calibrated, "ROUNDS", 0)
    _, merged = small_change(8, 64)
    seen = inputs(200, 64, 1)
    centred = (seen - seen.mean(0)).double()
    blocks, scales, _ = quantize_calibrated(merged[None], of(seen))
    # Optimal brain surgery in float64: each column rounded, its error spread over the others by the inverse of what is
    # left of the damped covariance (GPTQ, equations 2 and 3).
    weight, hessian = merged.double(), centred.T @ centred
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
    blocks, scales, shift = quantize_calibrated(base[None], of(inputs(50, 96, 1, device)))
    assert torch.equal(dequantize(blocks, scales, torch.float32)[0], base)
    assert not shift.any()


@pytest.mark.parametrize("count", [0, 1])
def test_an_expert_without_inputs_to_tell_is_rounded_to_the_nearest_and_others_do_not_care(count):
    _, merged = small_change(16, 64)
    seen = inputs(100, 64, 1)
    both = quantize_calibrated(torch.stack((merged, merged)), of(seen, seen[:count]))
    found = quantize_search(merged)
    assert torch.equal(both.blocks[1], found.blocks)
    assert torch.equal(both.scales[1], found.scales)
    assert both.shift[1].any() == (count == 1)
    alone = quantize_calibrated(merged[None], of(seen))
    assert torch.equal(both.blocks[0], alone.blocks[0])
    assert both.blocks.shape == (2, 16, 2, 16)
    assert both.scales.shape == (2, 16, 2)


def test_fewer_inputs_than_columns_and_one_of_zeros():
    _, merged = small_change(16, 96)
    seen = inputs(5, 96, 1)
    seen[:, 3] = 0
    assert all(part.isfinite().all() for part in quantize_calibrated(merged[None], of(seen)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_calibrated(torch.full((1, 2, 32), torch.nan), of(torch.randn(3, 32)))
