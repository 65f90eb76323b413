"""Rotary embedding: every implementation against float64 and against transformers, gradients included."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from ossia.kernels import rope as public

KERNEL = "rope"
pytestmark = pytest.mark.usefixtures("poison")
# Relative and absolute. bfloat16 is rounded once, by at most 2^-8 = 3.9e-3; truncation would show.
# Triton's interpreter (3.6 and 3.7) does truncate, by up to 2^-7: there the relative part is twice as large.
TOLERANCE = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 1e-6)}
# B, S, N, D
SHAPES = [(1, 1, 1, 64), (2, 5, 3, 16), (2, 7, 8, 64), (1, 3, 5, 80), (1, 2, 64, 64)]


@pytest.fixture
def rope(kernel):
    return kernel.rope


def interpreted(kernel, device):
    return device == "cpu" and kernel.__name__.endswith("triton")


def angles(batch, length, size, device):
    """cos and sin of fresh positions, times a factor as yarn's."""
    position = torch.randint(0, 10_000, (batch, length, 1), device=device)
    angle = position * 10_000.0 ** -torch.linspace(0, 1, size // 2, device=device)
    return angle.cos() * 1.35, angle.sin() * 1.35


def exact(x, cos, sin):
    """float64, pair by pair a complex product."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.cat((turned.real, turned.imag), -1)


def close(got, want, dtype, truncated=False):
    relative, absolute = TOLERANCE[dtype]
    if truncated and dtype == torch.bfloat16:
        relative *= 2
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_turn_and_gradient_against_float64(kernel, device, shape, shared, dtype):
    cos, sin = angles(1 if shared else shape[0], shape[1], shape[3], device)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    y = kernel.rope(x, cos, sin)
    probe = torch.randn_like(y)
    y.backward(probe)
    x64 = x.detach().double().requires_grad_()
    y64 = exact(x64, cos, sin)
    y64.backward(probe.double())
    close(y, y64, dtype, interpreted(kernel, device))
    close(x.grad, x64.grad, dtype, interpreted(kernel, device))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(rope, device, shape):
    cos, sin = angles(shape[0], shape[1], shape[3], device)
    x = torch.randn(shape, device=device, requires_grad=True)
    twin = x.detach().transpose(1, 2).clone().requires_grad_()
    y, (expected, _) = rope(x, cos, sin), apply_rotary_pos_emb(twin, twin, cos, sin)
    probe = torch.randn_like(y)
    y.backward(probe)
    expected.backward(probe.transpose(1, 2))
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, twin.grad.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_closer_to_float32_than_transformers(kernel, device):
    if interpreted(kernel, device):
        pytest.skip("the interpreter truncates")
    cos, sin = angles(1, 9, 64, device)
    x = torch.randn(1, 9, 8, 64, device=device).bfloat16()
    theirs, _ = apply_rotary_pos_emb(x, x, cos.bfloat16(), sin.bfloat16(), unsqueeze_dim=2)
    want = exact(x.double(), cos, sin)
    assert (kernel.rope(x, cos, sin).double() - want).norm() < 0.7 * (theirs.double() - want).norm()


def views(batch, length, heads, size, device):
    """[B, S, N, D] views of tensors that hold more, or hold it in another order."""
    wide = torch.randn(batch, length, (heads + 2) * size, device=device)
    yield "slice of a joint projection", wide[..., size:-size].unflatten(-1, (heads, size))
    yield "heads before positions", torch.randn(batch, heads, length, size, device=device).transpose(1, 2)
    yield "every other position", torch.randn(batch, 2 * length, heads, size, device=device)[:, ::2]
    yield "one head for all", torch.randn(batch, length, 1, size, device=device).expand(-1, -1, heads, -1)
    yield "columns apart", torch.randn(batch, length, size, heads, device=device).transpose(2, 3)


@pytest.mark.parametrize("which", range(5))
def test_views(rope, device, which):
    cos, sin = angles(2, 5, 16, device)
    _, x = list(views(2, 5, 3, 16, device))[which]
    assert not x.is_contiguous()
    x.requires_grad_()
    y = rope(x, cos, sin)
    probe = torch.randn(2, 3, 5, 16, device=device).transpose(1, 2)
    y.backward(probe)
    assert y.is_contiguous()
    close(y, exact(x.double(), cos, sin), torch.float32)
    close(x.grad, exact(probe.double(), cos, -sin), torch.float32)


def test_expanded_gradient_and_views_of_the_angles(rope, device):
    cos, sin = (t.transpose(1, 2).contiguous().transpose(1, 2).expand(2, -1, -1) for t in angles(1, 5, 16, device))
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    rope(x, cos, sin).sum().backward()
    close(x.grad, exact(torch.ones_like(x).double(), cos, -sin), torch.float32)


def test_turning_back_gives_the_factor_squared(rope, device):
    cos, sin = angles(2, 5, 16, device)
    x = torch.randn(2, 5, 3, 16, device=device)
    close(rope(rope(x, cos, sin), cos, -sin) / 1.35**2, x.double(), torch.float32)


def test_keeps_only_the_angles(triton_device):
    triton = import_module("ossia.kernels.rope.triton")
    cos, sin = angles(1, 5, 16, triton_device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        triton.rope(torch.randn(1, 5, 3, 16, device=triton_device, requires_grad=True), cos, sin)
    assert saved == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16)])
def test_nothing_to_turn(rope, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = rope(x, *angles(1, shape[1], 16, device))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_shapes_that_do_not_fit():
    cos, sin = angles(2, 5, 16, "cpu")
    for x in (torch.randn(3, 5, 1, 16), torch.randn(2, 4, 1, 16), torch.randn(2, 5, 1, 17), torch.randn(2, 5, 1, 32)):
        with pytest.raises(ValueError, match="expected x"):
            public.rope(x, cos, sin)
    with pytest.raises(ValueError, match="expected x"):
        public.rope(torch.randn(2, 5, 1, 16), cos, sin[:1])
