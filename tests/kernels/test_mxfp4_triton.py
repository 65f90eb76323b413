"""The Triton expansion equals the reference: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels.mxfp4 import reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expand(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from ossia.kernels.mxfp4 import triton

    return triton.dequantize(blocks.to(DEVICE), scales.to(DEVICE)).cpu()


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (3, 5, 64), (2, 3, 1, 160), (3, 11, 2880), (0, 4, 64)])
def test_random_blocks(shape):
    *lead, cols = shape
    blocks = torch.randint(0, 256, (*lead, cols // 32, 16), dtype=torch.uint8)
    scales = torch.randint(2, 252, (*lead, cols // 32), dtype=torch.uint8)
    values = expand(blocks, scales)
    assert values.shape == shape
    assert torch.equal(values, reference.dequantize(blocks, scales))


def test_every_byte_keeps_the_sign_of_zero():
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    scales = torch.full((1, 16), 127, dtype=torch.uint8)
    values, expected = expand(blocks, scales), reference.dequantize(blocks, scales)
    assert torch.equal(values, expected)
    assert torch.equal(values.signbit(), expected.signbit())


def test_every_scale():
    blocks = torch.full((254, 1, 16), 0x21, dtype=torch.uint8)
    scales = torch.arange(2, 256, dtype=torch.uint8).unsqueeze(1)
    values, expected = expand(blocks, scales), reference.dequantize(blocks, scales)
    assert torch.equal(values[:-1], expected[:-1])
    assert values[-1].isnan().all()


def test_views():
    blocks = torch.randint(0, 256, (3, 7, 3, 16), dtype=torch.uint8).transpose(0, 1)
    scales = torch.randint(100, 140, (3, 7, 3), dtype=torch.uint8).transpose(0, 1)
    assert torch.equal(expand(blocks, scales), reference.dequantize(blocks, scales))


def test_into_part_of_a_wider_tensor():
    from ossia.kernels.mxfp4 import triton

    blocks = torch.randint(0, 256, (3, 7, 3, 16), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(100, 140, (3, 7, 3), dtype=torch.uint8, device=DEVICE)
    wide = torch.full((3, 9, 104), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    triton.dequantize(blocks, scales, wide[:, :7, :96])
    assert torch.equal(wide[:, :7, :96].cpu(), reference.dequantize(blocks.cpu(), scales.cpu()))
    assert wide[:, 7:].isnan().all()
    assert wide[:, :, 96:].isnan().all()
