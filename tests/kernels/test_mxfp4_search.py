"""MXFP4 by search: against every exponent there is, and against transformers' own dequantizer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossia.kernels import mxfp4
from ossia.kernels.mxfp4 import search
from ossia.kernels.mxfp4.search import quantize_search

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
GRID = torch.cat((-GRID, GRID))

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Values where a neighbour of the plain exponent wins: quarters under 4, and 7 to 8.
quarters = st.integers(-32, 32).map(lambda n: n / 4)
low = st.sampled_from([0.25, -0.25, 0.75, 0.2, 4.0, 0.0])
blocks_of = [st.lists(kind, min_size=64, max_size=64) for kind in (finite, quarters, low)]


def squared_errors(weight: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 per block."""
    # Scales reach past float32 here, as errors do.
    values = mxfp4.dequantize(blocks, scales, torch.float32).double()
    return (values - weight.double()).square().view(*scales.shape, 32).sum(-1)


def least_errors(weight_N32: torch.Tensor) -> torch.Tensor:
    """The least squared error over every exponent of E8M0 that does not overflow, float64 [N]."""
    best = torch.full((len(weight_N32),), math.inf, dtype=torch.float64)
    for exponent in range(-127, 126):
        distance = (weight_N32.double().unsqueeze(-1) - GRID * 2.0**exponent).abs().amin(-1)
        best = torch.minimum(best, distance.square().sum(-1))
    return best


def noisy(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(st.one_of(*blocks_of))
def test_no_exponent_is_better_and_none_worse_than_plain(values: list[float]) -> None:
    weight = torch.tensor(values, dtype=torch.float32).view(1, 64)
    found = quantize_search(weight)
    errors = squared_errors(weight, found.blocks, found.scales)
    plain = squared_errors(weight, *mxfp4.quantize(weight))
    # Blocks are compared in float32.
    assert (errors <= plain * (1 + 1e-6)).all()
    torch.testing.assert_close(errors.flatten(), least_errors(weight.view(-1, 32)), rtol=1e-6, atol=0)
    torch.testing.assert_close(errors, found.error, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, found.plain_error, rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.one_of(*blocks_of))
def test_searching_twice_changes_no_value(values: list[float]) -> None:
    first = quantize_search(torch.tensor(values, dtype=torch.float32).view(1, 64))
    dense = mxfp4.dequantize(first.blocks, first.scales, torch.float32)
    again = quantize_search(dense)
    assert torch.equal(mxfp4.dequantize(again.blocks, again.scales, torch.float32), dense)
    assert not again.error.any()


def test_both_neighbours_win_and_ties_go_to_the_plain_exponent() -> None:
    weight = torch.zeros(4, 32)
    weight[0, :2] = torch.tensor([8.0, 7.9]) * 0.99  # 8 is in reach one higher
    weight[1] = 0.25
    weight[1, 0] = 4.0  # one lower has quarters
    weight[2, :3] = torch.tensor([4.0, -2.0, 1.0])  # exact at both
    weight[3, 0] = 7.0  # as far from 6 as from 8
    found, plain = quantize_search(weight), mxfp4.quantize(weight)[1]
    assert (found.scales.int() - plain.int()).flatten().tolist() == [1, -1, 0, 0]
    assert (found.error[:2] < found.plain_error[:2]).all()


def test_error_is_a_fifth_lower_where_the_plain_rule_clips() -> None:
    weight = noisy((64, 32)) * 0.1
    weight[:, 0] = 0.999
    found = quantize_search(weight)
    assert found.error.sum() < 0.8 * found.plain_error.sum()


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (3, 5, 64), (2, 3, 1, 160), (0, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_dtypes_and_chunks(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noisy(shape).to(dtype)
    whole = quantize_search(weight)
    assert whole.blocks.shape == (*shape[:-1], shape[-1] // 32, 16)
    assert whole.scales.shape == whole.error.shape == whole.plain_error.shape == (*shape[:-1], shape[-1] // 32)
    monkeypatch.setattr(search, "_CHUNK_BLOCKS", {"cpu": 3})
    for views in (weight, weight.mT.contiguous().mT):
        for ours, want in zip(quantize_search(views), whole, strict=True):
            assert torch.equal(ours, want)


def test_nibbles_and_scales_as_transformers_reads_them() -> None:
    found = quantize_search(noisy((3, 10, 96)) * 0.02)
    theirs = convert_moe_packed_tensors(found.blocks, found.scales, dtype=torch.float32)
    ours = mxfp4.dequantize(found.blocks, found.scales, torch.float32)
    assert torch.equal(theirs.reshape(3, 96, 10), ours.transpose(1, 2))


def test_zeros_and_extremes() -> None:
    largest = torch.finfo(torch.float32).max
    weight = torch.zeros(5, 32)
    weight[1] = largest
    weight[2, 0] = 2.0**-149
    weight[3] = 2.0**-126
    weight[4, 0] = -0.0
    found = quantize_search(weight)
    values = mxfp4.dequantize(found.blocks, found.scales, torch.float32)
    assert values.isfinite().all()
    assert values[1].unique().tolist() == [6 * 2.0**125]
    assert torch.equal(values[[0, 2, 3, 4]], torch.where(weight > 2.0**-140, weight, 0)[[0, 2, 3, 4]])
    assert found.scales[0].item() == found.scales[2].item() == 0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_search(torch.zeros(4, 40))
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.zeros(2, 32)
        weight[1, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_search(weight)
