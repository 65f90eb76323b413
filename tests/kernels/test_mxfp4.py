"""MXFP4 against the definition in the OCP MX specification 1.0, written out slowly here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.kernels import mxfp4
from ossia.kernels.mxfp4 import reference

CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
CODES += [-c for c in CODES]
SHAPES = [(1, 32), (7, 96), (3, 5, 64), (2, 3, 1, 160)]


def spelled_out(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 [N, cols] of blocks [N, G, 16] and scales [N, G], one Python number at a time."""
    rows = []
    for row, row_scales in zip(blocks.tolist(), scales.tolist(), strict=True):
        values: list[float] = []
        for block, scale in zip(row, row_scales, strict=True):
            for byte in block:
                values += [CODES[byte & 15] * 2.0 ** (scale - 127), CODES[byte >> 4] * 2.0 ** (scale - 127)]
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def random_mxfp4(*shape: int, low: int = 0, high: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    *lead, cols = shape
    blocks = torch.randint(0, 256, (*lead, cols // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(low, high, (*lead, cols // 32), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    scales = torch.full((1, 16), 127, dtype=torch.uint8)
    expected = torch.tensor([[CODES[b & 15], CODES[b >> 4]] for b in range(256)]).flatten()
    values = mxfp4.dequantize(blocks, scales, dtype).flatten()
    assert torch.equal(values.float(), expected)
    assert torch.equal(values.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_scale(dtype: torch.dtype) -> None:
    blocks = torch.full((256, 1, 16), 0x21, dtype=torch.uint8)  # 0.5 in even columns, 1 in odd ones
    values = mxfp4.dequantize(blocks, torch.arange(256, dtype=torch.uint8).unsqueeze(1), dtype).double()
    for s in range(255):
        assert values[s, 0::2].unique().tolist() == [math.ldexp(0.5, s - 127)]
        assert values[s, 1::2].unique().tolist() == [math.ldexp(1.0, s - 127)]
    assert values[255].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.bfloat16, 0, 252), (torch.float32, 0, 252), (torch.float16, 117, 140), (torch.float64, 0, 252)],
)
def test_dequantize(shape: tuple[int, ...], dtype: torch.dtype, low: int, high: int) -> None:
    blocks, scales = random_mxfp4(*shape, low=low, high=high)
    expected = spelled_out(blocks.reshape(-1, *blocks.shape[-2:]), scales.reshape(-1, scales.shape[-1]))
    values = mxfp4.dequantize(blocks, scales, dtype)
    assert values.shape == shape
    assert values.dtype == dtype
    assert torch.equal(values.double().reshape(expected.shape), expected)


def test_scales_belong_to_their_block() -> None:
    blocks = torch.full((2, 3, 2, 16), 0x22, dtype=torch.uint8)  # all ones
    scales = torch.arange(120, 132, dtype=torch.uint8).reshape(2, 3, 2)
    expected = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)
    assert torch.equal(mxfp4.dequantize(blocks, scales, torch.float32), expected)


def test_chunks_views_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = random_mxfp4(3, 7, 96, high=250)
    expected = mxfp4.dequantize(blocks, scales)
    weight = torch.randn(3, 7, 96)
    whole = mxfp4.quantize(weight)
    monkeypatch.setattr(reference, "_CHUNK_BYTES", {"cpu": 5 * 32})
    out = torch.full((3, 7, 96), float("nan"), dtype=torch.bfloat16)
    assert mxfp4.dequantize(blocks, scales, out=out) is out
    assert torch.equal(out, expected)
    wide = torch.full((3, 9, 104), float("nan"), dtype=torch.bfloat16)
    mxfp4.dequantize(blocks, scales, out=wide[:, 1:8, 8:])
    assert torch.equal(wide[:, 1:8, 8:], expected)
    assert wide[:, 1:8, :8].isnan().all()
    assert wide[:, [0, 8]].isnan().all()
    assert torch.equal(mxfp4.dequantize(blocks.transpose(0, 1), scales.transpose(0, 1)), expected.transpose(0, 1))
    for ours, theirs in zip(mxfp4.quantize(weight.mT.contiguous().mT), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_empty() -> None:
    blocks, scales = mxfp4.quantize(torch.empty(0, 4, 64))
    assert (blocks.shape, scales.shape) == ((0, 4, 2, 16), (0, 4, 2))
    assert mxfp4.dequantize(blocks, scales).shape == (0, 4, 64)


def brute_force(values: list[float]) -> tuple[int, list[int]]:
    """Scale byte and 32 codes: the nearest value, of two equally near ones the one with the even code."""
    amax = max(abs(v) for v in values)
    exponent = max(math.floor(math.log2(amax)) - 2, -127) if amax else -127
    codes = []
    for value in values:
        scaled = abs(value) / 2.0**exponent
        code = min(range(8), key=lambda c: (abs(CODES[c] - scaled), c & 1))
        codes.append(code | (8 if math.copysign(1.0, value) < 0 else 0))
    return exponent + 127, codes


def check_quantize(block: list[float]) -> None:
    weight = torch.tensor([block], dtype=torch.float32)
    blocks, scales = mxfp4.quantize(weight)
    scale, codes = brute_force(weight[0].double().tolist())
    assert scales.tolist() == [[scale]]
    assert torch.stack((blocks[0, 0] & 15, blocks[0, 0] >> 4), dim=-1).flatten().tolist() == codes


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Values on and beside the midpoints between codes, where a wrong tie shows.
eighths = st.integers(-64, 64).map(lambda n: n / 8)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.lists(finite, min_size=32, max_size=32), st.lists(eighths, min_size=32, max_size=32)))
def test_quantize_is_nearest_with_ties_to_even(block: list[float]) -> None:
    check_quantize(block)


@pytest.mark.parametrize("power", [-130, -20, 0, 31, 120])
def test_quantize_ties(power: int) -> None:
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    near = [math.nextafter(m, side) for m in midpoints for side in (0.0, 9.0)]
    block = torch.tensor([4.0, *midpoints, *(-m for m in midpoints), *near], dtype=torch.float64)
    check_quantize([*(block * 2.0**power).tolist(), 0.0, -0.0, 7.9 * 2.0**power])


@settings(max_examples=100, deadline=None)
@given(st.lists(finite, min_size=64, max_size=64), st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantizing_twice_changes_nothing(values: list[float], dtype: torch.dtype) -> None:
    first = mxfp4.quantize(torch.tensor(values).reshape(1, 64))
    again = mxfp4.quantize(mxfp4.dequantize(*first, dtype))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_zeros_and_extremes() -> None:
    blocks, scales = mxfp4.quantize(torch.zeros(2, 64))
    assert not blocks.any()
    assert not scales.any()
    assert not mxfp4.dequantize(blocks, scales).any()

    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([[largest, -largest] * 16, [2.0**-149, 0.0] * 16, [1.0] + [0.0] * 31])
    blocks, scales = mxfp4.quantize(weight)
    assert scales.flatten().tolist() == [252, 0, 125]
    values = mxfp4.dequantize(blocks, scales, torch.float32)
    assert values[0].unique().tolist() == [-6 * 2.0**125, 6 * 2.0**125]
    assert not values[1].any()
    assert torch.equal(values[2], weight[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantize_takes_every_float_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 64).to(dtype)
    for ours, theirs in zip(mxfp4.quantize(weight), mxfp4.quantize(weight.float()), strict=True):
        assert torch.equal(ours, theirs)


def test_wrong_input_is_refused() -> None:
    blocks, scales = random_mxfp4(4, 64)
    with pytest.raises(ValueError, match="uint8"):
        mxfp4.dequantize(blocks.int(), scales)
    with pytest.raises(ValueError, match=r"got \[4, 2, 16\] and \[4, 1\]"):
        mxfp4.dequantize(blocks, scales[:, :1])
    with pytest.raises(ValueError, match="floating point type"):
        mxfp4.dequantize(blocks, scales, torch.int32)
    for out in (torch.empty(4, 64), torch.empty(4, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="out must be"):
            mxfp4.dequantize(blocks, scales, out=out)
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.quantize(torch.zeros(4, 40))
    with pytest.raises(ValueError, match="floating point tensor"):
        mxfp4.quantize(torch.zeros(4, 32, dtype=torch.int8))
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.zeros(2, 32)
        weight[1, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            mxfp4.quantize(weight)
