"""A linear layer with its adapter against float64, output and every gradient."""

import pytest
import torch

from ossia.kernels import lora_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24, (16,), 3), (2, 7, 40, (24, 8, 8), 8), (3, 33, 16, (64, 16), 16)])
@pytest.mark.parametrize("which", ["fused", "reference"])
def test_outputs_and_gradients_against_float64(device, which, shape, bias, dtype):
    batch, length, inputs, sizes, rank = shape
    torch.manual_seed(length)
    x = torch.randn(batch, length, inputs).to(device, dtype)
    layers = [
        lora_linear.Layer(
            torch.randn(outputs, inputs).to(device, dtype),
            torch.randn(outputs).to(device, dtype) if bias else None,
            torch.randn(rank + number, inputs, device=device),
            torch.randn(outputs, rank + number, device=device) * rank**-0.5,
            1.5 - number,
        )
        for number, outputs in enumerate(sizes)
    ]
    probes = [torch.randn(batch, length, outputs, device=device) for outputs in sizes]

    def run(function, kind):
        taken = x.to(kind or x.dtype, copy=True).requires_grad_()
        mine = [
            lora_linear.Layer(
                layer.weight.to(kind or dtype),
                None if layer.bias is None else layer.bias.to(kind or dtype),
                layer.a.to(kind or layer.a.dtype, copy=True).requires_grad_(),
                layer.b.to(kind or layer.b.dtype, copy=True).requires_grad_(),
                layer.scale,
            )
            for layer in layers
        ]
        outs = function(taken, mine)
        sum((out.double() * probe.double()).sum() for out, probe in zip(outs, probes, strict=True)).backward()
        return [*(out.detach() for out in outs), taken.grad, *(t.grad for layer in mine for t in (layer.a, layer.b))]

    def exact(x, layers):
        outs = (x @ (layer.weight + layer.scale * layer.b @ layer.a).T for layer in layers)
        return [out if layer.bias is None else out + layer.bias for out, layer in zip(outs, layers, strict=True)]

    def one_by_one(x, layers):
        return [lora_linear.reference(x, *layer) for layer in layers]

    function = lora_linear.lora_linears if which == "fused" else one_by_one
    for got, want in zip(run(function, None), run(exact, torch.float64), strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_adapters_of_float32_get_gradients_of_float32(device):
    a = torch.randn(2, 8, device=device, requires_grad=True)
    b = torch.zeros(16, 2, device=device, requires_grad=True)
    x, weight = torch.randn(3, 8).to(device, torch.bfloat16), torch.randn(16, 8).to(device, torch.bfloat16)
    lora_linear.lora_linears(x, [lora_linear.Layer(weight, None, a, b, 2.0)])[0].sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
