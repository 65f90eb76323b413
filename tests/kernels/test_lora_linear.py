"""A linear layer with its adapter against float64, output and every gradient."""

import pytest
import torch

from ossia.kernels import lora_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24, 16, 3), (2, 7, 40, 24, 8), (3, 33, 16, 64, 16)])
@pytest.mark.parametrize("which", ["lora_linear", "reference"])
def test_output_and_gradients_against_float64(device, which, shape, bias, dtype):
    batch, length, inputs, outputs, rank = shape
    torch.manual_seed(length)
    x = torch.randn(batch, length, inputs).to(device, dtype)
    weight, offset = torch.randn(outputs, inputs).to(device, dtype), torch.randn(outputs).to(device, dtype)
    a, b = torch.randn(rank, inputs, device=device), torch.randn(outputs, rank, device=device)
    probe = torch.randn(batch, length, outputs).to(device, dtype)

    def run(function, kind):
        leaves = [t.to(kind or t.dtype, copy=True).requires_grad_() for t in (x, a, b)]
        frozen = [t.to(kind or t.dtype) for t in (weight, offset)]
        out = function(leaves[0], frozen[0], frozen[1] if bias else None, *leaves[1:], 1.5)
        out.backward(probe.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def exact(x, weight, offset, a, b, scale):
        out = x @ (weight + scale * b @ a).T
        return out if offset is None else out + offset

    for got, want in zip(run(getattr(lora_linear, which), None), run(exact, torch.float64), strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_adapters_of_float32_get_gradients_of_float32(device):
    a = torch.randn(2, 8, device=device, requires_grad=True)
    b = torch.zeros(16, 2, device=device, requires_grad=True)
    x, weight = torch.randn(3, 8).to(device, torch.bfloat16), torch.randn(16, 8).to(device, torch.bfloat16)
    lora_linear.lora_linear(x, weight, None, a, b, 2.0).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
