"""RMS normalization: every implementation against float64 and against transformers, gradients included."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from ossia.kernels import rms_norm as public

KERNEL = "rms_norm"
pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-5
# Relative and absolute. bfloat16 is rounded once, by at most 2^-8 = 3.9e-3; truncation would show.
# Triton's interpreter (3.6 and 3.7) does truncate, by up to 2^-7: see `tolerance`.
TOLERANCE = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (4e-3, 2e-6)}
SHAPES = [(1, 48), (7, 100), (2, 3, 48), (3, 2880)]


def case(shape, dtype, device, weight_dtype=None):
    """x and residual, of rows that differ in size by orders of magnitude and one of zeros; the weight."""
    size = 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1))
    x, residual = ((torch.randn(shape) * size).to(device, dtype) for _ in range(2))
    if len(shape) == 2 and shape[0] > 1:
        x[1] = residual[1] = 0
    weight = torch.rand(shape[-1:]).to(device, weight_dtype or dtype) + 0.5
    return x.requires_grad_(), residual.requires_grad_(), weight


def exact(x, weight):
    """float64."""
    return weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def interpreted(kernel, device):
    return device == "cpu" and kernel.__name__.endswith("triton")


def tolerance(kernel, device, dtype):
    relative, absolute = TOLERANCE[dtype]
    return (2 * relative if interpreted(kernel, device) and dtype == torch.bfloat16 else relative), absolute


def close(got, want, dtype, tolerance):
    """Elementwise; the absolute part grows with the row, whose float32 sums cancel."""
    relative, absolute = tolerance
    assert got.dtype == dtype
    want = want.double()
    room = relative * want.abs() + absolute * want.abs().amax(-1, keepdim=True) + 1e-12
    assert ((got.double() - want).abs() <= room).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_gradient_against_float64(kernel, device, shape, dtype):
    x, _, weight = case(shape, dtype, device)
    y = kernel.rms_norm(x, weight, EPS)
    probe = torch.randn_like(y)
    y.backward(probe)

    x64 = x.detach().double().requires_grad_()
    y64 = exact(x64, weight)
    y64.backward(probe.double())
    close(y, y64, dtype, tolerance(kernel, device, dtype))
    close(x.grad, x64.grad, dtype, tolerance(kernel, device, dtype))


@pytest.mark.parametrize("used", ["both", "total", "y"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_norm_and_both_gradients_against_float64(kernel, device, shape, dtype, used):
    x, residual, weight = case(shape, dtype, device)
    total, y = kernel.add_rms_norm(x, residual, weight, EPS)
    if interpreted(kernel, device):
        close(total, x.double() + residual.double(), dtype, tolerance(kernel, device, dtype))
    else:
        assert torch.equal(total, x + residual)

    probes = {"total": torch.randn_like(total), "y": torch.randn_like(y)}
    names = ["total", "y"] if used == "both" else [used]
    torch.autograd.backward([{"total": total, "y": y}[name] for name in names], [probes[name] for name in names])
    total64 = total.detach().double().requires_grad_()
    y64 = exact(total64, weight)
    outputs = {"total": total64 * 1, "y": y64}
    torch.autograd.backward([outputs[name] for name in names], [probes[name].double() for name in names])

    close(y, y64, dtype, tolerance(kernel, device, dtype))
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    if kernel.__name__.endswith("triton"):
        close(x.grad, total64.grad, dtype, tolerance(kernel, device, dtype))
    else:  # autograd rounds the norm's gradient before it adds the other one
        assert (x.grad.double() - total64.grad).norm() <= 2 * TOLERANCE[dtype][0] * total64.grad.norm()


@pytest.mark.parametrize("weight_dtype", list(TOLERANCE))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [48, 100, 2880])
def test_equals_transformers(kernel, device, size, dtype, weight_dtype):
    x, _, weight = case((2, 7, size), dtype, device, weight_dtype)
    module = GptOssRMSNorm(size, EPS)
    module.weight = torch.nn.Parameter(weight)
    twin = x.detach().clone().requires_grad_()
    y, expected = kernel.rms_norm(x, weight, EPS), module(twin)
    probe = torch.randn_like(y)
    y.backward(probe)
    expected.backward(probe)
    if kernel.__name__.endswith("reference"):
        assert torch.equal(y, expected)
    # Both are rounded: they may lie one unit in the last place apart.
    twice = tuple(2 * part for part in TOLERANCE[dtype])
    close(y, expected, dtype, twice)
    close(x.grad, twin.grad, dtype, twice)


def test_views_and_an_expanded_gradient(kernel, device):
    base = torch.randn(48, 5, device=device)
    x, residual = base.T.requires_grad_(), torch.randn(5, 96, device=device)[:, ::2].requires_grad_()
    weight = torch.rand(96, device=device)[::2]
    total, y = kernel.add_rms_norm(x, residual, weight, EPS)
    (total.sum() + y.sum() + kernel.rms_norm(x, weight, EPS).sum()).backward()
    x64, residual64 = (t.detach().double().requires_grad_() for t in (x, residual))
    total64 = x64 + residual64
    (total64.sum() + exact(total64, weight).sum() + exact(x64, weight).sum()).backward()
    for got, want in ((y, exact(total64, weight)), (x.grad, x64.grad), (residual.grad, residual64.grad)):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_weight_and_what_is_frozen_get_no_gradient(kernel, device):
    x, residual, weight = case((3, 48), torch.float32, device)
    weight.requires_grad_()
    residual.requires_grad_(False)
    total, y = kernel.add_rms_norm(x, residual, weight, EPS)
    (total.sum() + y.sum() + kernel.rms_norm(x, weight, EPS).sum()).backward()
    assert x.grad is not None
    assert residual.grad is weight.grad is None


def test_one_tensor_as_both(kernel, device):
    x, _, weight = case((3, 48), torch.float32, device)
    total, y = kernel.add_rms_norm(x, x, weight, EPS)
    probe = torch.randn_like(y)
    torch.autograd.backward([total, y], [probe, probe])
    x64 = x.detach().double().requires_grad_()
    total64 = x64 * 2
    torch.autograd.backward([total64, exact(total64, weight)], [probe.double()] * 2)
    assert (x.grad.double() - x64.grad).norm() <= 1e-5 * x64.grad.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_residual_what_goes_on_beside_adds_to_the_gradient(kernel, device, shape, dtype):
    x, _, weight = case(shape, dtype, device)
    total, y = kernel.add_rms_norm(x, None, weight, EPS)
    assert torch.equal(total, x)
    probes = torch.randn_like(x), torch.randn_like(y)
    torch.autograd.backward([total, y], list(probes))
    x64 = x.detach().double().requires_grad_()
    torch.autograd.backward([x64 * 1, exact(x64, weight)], [probe.double() for probe in probes])
    if kernel.__name__.endswith("triton"):
        close(x.grad, x64.grad, dtype, tolerance(kernel, device, dtype))
    else:
        assert (x.grad.double() - x64.grad).norm() <= 2 * TOLERANCE[dtype][0] * x64.grad.norm()


def test_no_rows(kernel, device):
    x, residual, weight = case((0, 48), torch.float32, device)
    total, y = kernel.add_rms_norm(x, residual, weight, EPS)
    (total.sum() + y.sum() + kernel.rms_norm(x, weight, EPS).sum()).backward()
    assert total.shape == y.shape == x.grad.shape == residual.grad.shape == (0, 48)


def test_shapes_that_do_not_fit():
    x, weight = torch.randn(3, 48), torch.ones(48)
    with pytest.raises(ValueError, match=r"\[3, 48\] and \[47\]"):
        public.rms_norm(x, weight[1:], EPS)
    for residual in (x[:1], x.bfloat16()):
        with pytest.raises(ValueError, match="residual must be like x"):
            public.add_rms_norm(x, residual, weight, EPS)
