"""The contract of `ossia.kernels.mxfp4` in PyTorch alone, on any device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 32
"""Columns that share one scale."""

_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MAX_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2^2
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Bytes of `blocks` handled at a time: the int64 indices of a chunk take 8 MiB, and 128 MiB on a GPU, where each chunk
# costs its launches.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 24}

# One lookup yields both values of a byte when the pair is moved as one integer.
_PAIR_INTEGER = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@lru_cache(maxsize=16)
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] integers, entry b being the bits of (low nibble's value, high nibble's value) in `dtype`."""
    codes = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=dtype)
    byte = torch.arange(256)
    pairs = torch.stack((codes[byte & 15], codes[byte >> 4]), dim=-1)
    return pairs.view(_PAIR_INTEGER[dtype]).flatten().to(device)


@lru_cache(maxsize=16)
def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] values of the scale byte in `dtype`; both ends, 2^-127 (subnormal) and 2^127, are exact."""
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - _BIAS)
    powers[255] = float("nan")
    return powers.to(dtype).to(device)


@lru_cache(maxsize=4)
def _boundaries(device: torch.device) -> Tensor:
    """[7] float32 upper ends of the codes 0..6; a tie belongs to the code with the even mantissa."""
    ends = torch.tensor(_MIDPOINTS, dtype=torch.float32)
    below = torch.nextafter(ends, torch.zeros(()))
    tie_goes_up = torch.arange(len(_MIDPOINTS)) % 2 == 1
    return torch.where(tie_goes_up, below, ends).to(device)


@lru_cache(maxsize=4)
def _magnitudes(device: torch.device) -> Tensor:
    return torch.tensor(_MAGNITUDES, device=device)


def dequantize(
    blocks: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Expand MXFP4 to `dtype`.

    blocks uint8 [..., rows, cols/32, 16], scales uint8 [..., rows, cols/32] -> [..., rows, cols].
    `out`, where given, is of that shape and of `dtype`; it is filled and returned. Temporary memory stays below 32 MB
    whatever the size, where `out` is contiguous. Raises ValueError for shapes, dtypes or an `out` that do not fit.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales must be uint8, got {blocks.dtype} and {scales.dtype}")
    if blocks.ndim < 3 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            "expected blocks [..., rows, cols/32, 16] with scales [..., rows, cols/32], "
            f"got {list(blocks.shape)} and {list(scales.shape)}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    elif out.shape != shape or out.dtype != dtype or out.device != blocks.device:
        raise ValueError(
            f"out must be {list(shape)}, {dtype} on {blocks.device}; got {list(out.shape)}, {out.dtype} on {out.device}"
        )
    elif not out.is_contiguous():
        return out.copy_(dequantize(blocks, scales, dtype))

    work = dtype if dtype in _PAIR_INTEGER else torch.float32
    pairs, powers = _pairs(work, blocks.device), _powers(work, blocks.device)
    blocks_N16, scales_N, out_N32 = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1), out.view(-1, BLOCK)
    step = _chunk_bytes(blocks.device) // (BLOCK // 2)
    for start in range(0, scales_N.numel(), step):
        piece = slice(start, start + step)
        values = torch.take(pairs, blocks_N16[piece].long()).view(work)
        scale = torch.take(powers, scales_N[piece].long()).unsqueeze(-1)
        if work == dtype:
            torch.mul(values, scale, out=out_N32[piece])
        else:
            out_N32[piece] = values * scale
    return out


def _chunk_bytes(device: torch.device) -> int:
    return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"])


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to MXFP4.

    weight floating [..., rows, cols], cols a multiple of 32 -> blocks uint8 [..., rows, cols/32, 16] and scales
    uint8 [..., rows, cols/32]. Rounding starts from the float32 value. Raises ValueError for another shape or dtype
    and for values that are not finite in float32, which MXFP4 cannot hold.
    """
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be a floating point tensor, got {weight.dtype}")
    if weight.ndim < 2 or weight.shape[-1] % BLOCK:
        raise ValueError(f"expected [..., rows, cols] with cols a multiple of {BLOCK}, got {list(weight.shape)}")
    shape = (*weight.shape[:-1], weight.shape[-1] // BLOCK)
    weight_N32 = weight.detach().reshape(-1, BLOCK)
    blocks_N16 = torch.empty((weight_N32.shape[0], BLOCK // 2), dtype=torch.uint8, device=weight.device)
    scales_N = torch.empty(weight_N32.shape[0], dtype=torch.uint8, device=weight.device)
    step = _chunk_bytes(weight.device) // BLOCK
    for start in range(0, weight_N32.shape[0], step):
        piece = slice(start, start + step)
        values = weight_N32[piece].float()
        amax = values.abs().amax(dim=-1)
        if not bool(amax.isfinite().all()):
            raise ValueError(f"weight of shape {list(weight.shape)} holds NaN or infinity; MXFP4 has neither")
        # frexp's mantissa lies in [0.5, 1), so floor(log2(amax)) is its exponent minus one.
        exponent = (torch.frexp(amax).exponent - 1 - _MAX_EXPONENT).clamp(-_BIAS, _BIAS)
        exponent.masked_fill_(amax == 0, -_BIAS)
        blocks_N16[piece] = nearest_codes(torch.ldexp(values, -exponent.unsqueeze(-1)))
        scales_N[piece] = (exponent + _BIAS).to(torch.uint8)
    return blocks_N16.view(*shape, BLOCK // 2), scales_N.view(shape)


def nearest_codes(scaled_N32: Tensor) -> Tensor:
    """The nearest codes of float32 values in units of their scale, two in a byte: uint8 [N, 16]."""
    codes = _nearest_magnitude(scaled_N32, torch.int32).to(torch.uint8)
    codes |= scaled_N32.signbit().to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def nearest_values(scaled: Tensor) -> Tensor:
    """What the nearest codes stand for, in units of the scale: float32 of any shape."""
    return torch.take(_magnitudes(scaled.device), _nearest_magnitude(scaled, torch.int64)).copysign(scaled)


def _nearest_magnitude(scaled: Tensor, index: torch.dtype) -> Tensor:
    return torch.bucketize(scaled.abs(), _boundaries(scaled.device), out_int32=index == torch.int32)
