"""Grouped products against one product per row, in float64."""

import pytest
import torch

from ossia.kernels.grouped_linear import grouped_linear, grouped_linear_mxfp4
from ossia.kernels.mxfp4 import dequantize, quantize

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 7], [1, 1, 1, 1]]


def case(counts, dtype, device, inputs=32):
    torch.manual_seed(sum(counts))
    # torch's grouped_mm wants rows of 16 bytes.
    outputs = 9 if device == "cpu" else 24
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randn(sum(counts), inputs).to(device, dtype).requires_grad_()
    weight = torch.randn(len(counts), inputs, outputs).to(device, dtype)
    return ends, expert, x, weight


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("counts", COUNTS)
def test_product_and_both_gradients(device, counts, dtype):
    ends, expert, x, weight = case(counts, dtype, device)
    weight.requires_grad_()
    out = grouped_linear(x, weight, ends)
    probe = torch.randn(out.shape, dtype=torch.float64, device=device)
    (out.double() * probe).sum().backward()

    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.einsum("si,sio->so", x64, w64[expert])
    (expected * probe).sum().backward()
    for got, want in ((out, expected), (x.grad, x64.grad), (weight.grad, w64.grad)):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("counts", COUNTS)
def test_mxfp4_weight_equals_its_dequantized_one(device, counts, dtype):
    ends, _, x, weight = case(counts, dtype, device, inputs=64)
    blocks, scales = quantize(weight.transpose(1, 2).float())
    twin = x.detach().clone().requires_grad_()
    dense = dequantize(blocks, scales, dtype).transpose(1, 2)
    out, expected = grouped_linear_mxfp4(x, blocks, scales, ends), grouped_linear(twin, dense, ends)
    probe = torch.randn_like(out)
    out.backward(probe)
    expected.backward(probe)
    assert torch.equal(out, expected)
    assert (x.grad.double() - twin.grad.double()).norm() <= TOLERANCE[dtype] * twin.grad.double().norm()


def test_mxfp4_product_keeps_no_dequantized_weight():
    blocks, scales = quantize(torch.randn(2, 64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        x = torch.randn(4, 64, requires_grad=True)
        grouped_linear_mxfp4(x, blocks, scales, torch.tensor([1, 4], dtype=torch.int32))
    assert set(saved) == {torch.uint8, torch.int32}
