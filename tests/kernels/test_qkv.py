"""Queries, keys and values in one step: against float64, output and every gradient."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels import qkv

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case:
    """A batch and its layers, drawn anew for each shape; each adapter has a rank and a scale of its own."""

    def __init__(self, device, dtype, batch, length, inputs, heads, kv_heads, size, bias, shared):
        torch.manual_seed(length)
        self.x = torch.randn(batch, length, inputs).to(device, dtype)
        outputs = [heads * size, kv_heads * size, kv_heads * size]
        self.weight = torch.randn(sum(outputs), inputs).to(device, dtype)
        self.bias = torch.randn(sum(outputs)).to(device, dtype) if bias else None
        self.adapters = [
            qkv.Adapter(torch.randn(r, inputs, device=device), torch.randn(o, r, device=device) * 0.5, 1.5 - r)
            for o, r in zip(outputs, (2, 3, 1), strict=True)
        ]
        angle = torch.rand(1 if shared else batch, length, size // 2, device=device) * 6
        self.cos, self.sin = angle.cos() * 1.3, angle.sin() * 1.3
        shapes = [(batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
        self.probes = [torch.randn(shape, device=device) for shape in shapes]

    def run(self, function, dtype=None):
        """Outputs, then the gradients of x and of every A and B."""

        def cast(tensor):
            return None if tensor is None else tensor.to(dtype or tensor.dtype, copy=True)

        x = cast(self.x).requires_grad_()
        adapters = [
            qkv.Adapter(cast(a).requires_grad_(), cast(b).requires_grad_(), scale) for a, b, scale in self.adapters
        ]
        outs = function(x, cast(self.weight), cast(self.bias), adapters, cast(self.cos), cast(self.sin))
        sum((out.double() * probe.double()).sum() for out, probe in zip(outs, self.probes, strict=True)).backward()
        return [*outs, x.grad, *(tensor.grad for adapter in adapters for tensor in adapter[:2])]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("bias", "shared"), [(True, True), (False, False)])
@pytest.mark.parametrize("shape", [(1, 1, 24, 1, 1, 16), (2, 7, 40, 6, 2, 16), (2, 5, 48, 64, 8, 64)])
@pytest.mark.parametrize("which", ["fused", "reference"])
def test_outputs_and_gradients_against_float64(request, device, which, shape, bias, shared, dtype):
    function = qkv.reference
    if which == "fused":
        request.getfixturevalue("triton_device")
        from ossia.kernels.qkv.fused import qkv as function
    case = Case(device, dtype, *shape, bias, shared)
    got, want = case.run(function), case.run(qkv.reference, torch.float64)
    assert [g.dtype for g in got] == [dtype] * 4 + [torch.float32] * 6
    for mine, exact in zip(got, want, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= DTYPES[dtype] * exact.norm()


def test_frozen_input_and_no_gradient_at_all(triton_device):
    from ossia.kernels.qkv.fused import qkv as fused

    case = Case(triton_device, torch.float32, 2, 3, 24, 2, 1, 16, True, True)
    for adapter in case.adapters:
        adapter.a.requires_grad_()
    inputs = (case.x, case.weight, case.bias, case.adapters, case.cos, case.sin)
    sum(out.sum() for out in fused(*inputs)).backward()
    assert case.x.grad is None
    assert all(adapter.a.grad is not None for adapter in case.adapters)
    with torch.no_grad():
        assert not any(out.requires_grad for out in fused(*inputs))
