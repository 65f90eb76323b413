"""Attention over short windows against the reference in float64, gradients included; poisoned memory, strided views."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels.attention import reference
from ossia.kernels.attention.window import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-5


def fused(batch, length, heads, kv_heads, size):
    """q, k and v as views of one [B, S, N + 2 M, D]; k with a scale that makes shares uneven."""
    both = torch.randn(batch, length, heads + 2 * kv_heads, size, device=DEVICE).to(DTYPE)
    both[:, :, heads : heads + kv_heads] *= 2
    return both.split((heads, kv_heads, kv_heads), dim=2)


def check(qkv, sinks, window, bounds=None):
    """Out and gradients are the reference's, by the norm of the difference."""
    scale = qkv[0].shape[-1] ** -0.5
    given = [x.detach().requires_grad_() for x in qkv]
    out = attention(*given, sinks, scale, window, bounds)
    probe = torch.randn(out.shape, device=DEVICE).to(DTYPE)
    out.backward(probe)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*exact, sinks.double(), scale, window, bounds)
    expected.backward(probe.double())
    assert out.dtype == DTYPE
    assert out.is_contiguous()
    for got, want in [(out, expected), *((g.grad, e.grad) for g, e in zip(given, exact, strict=True))]:
        # Window 1 gives q no gradient to speak of without a sink: an absolute part for what is all rounding.
        assert (got.double() - want).norm() <= TOLERANCE * (want.norm() + 1e-3 * probe.norm())


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that is not written to is NaN."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "empty", lambda *n, **options: torch.full(*n, float("nan"), **options))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


@pytest.mark.parametrize("length", [1, 5, 70, 200])
@pytest.mark.parametrize("window", [1, 5, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 1, 16), (6, 2, 32), (8, 1, 64)])
def test_out_and_gradients_against_float64(length, window, heads, kv_heads, size):
    check(fused(2 if length < 100 else 1, length, heads, kv_heads, size), torch.randn(heads, device=DEVICE) * 2, window)


@pytest.mark.parametrize("window", [1, 5, 128])
@pytest.mark.parametrize("places", [(0, 75, 150), (0, 1, 2, 9, 75, 76, 149, 150), tuple(range(151))])
def test_documents_do_not_see_each_other(window, places):
    bounds = torch.tensor(places, dtype=torch.int32, device=DEVICE)
    check(fused(2, 75, 6, 2, 16), torch.randn(6, device=DEVICE), window, bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sink_may_take_everything_or_nothing(dtype):
    check(fused(1, 40, 4, 2, 16), torch.tensor([30.0, -1e4, 0.0, -30.0], device=DEVICE).to(dtype), 9)


def test_any_strides_and_an_expanded_gradient():
    given = [torch.randn(40, n, 2, 32, device=DEVICE).to(DTYPE).permute(2, 0, 1, 3)[..., 8:24] for n in (4, 2, 2)]
    check(given, torch.randn(4, device=DEVICE), 9)
    given = [x.clone().requires_grad_() for x in given]
    sinks = torch.zeros(4, device=DEVICE)
    ones, expanded = (
        torch.autograd.grad(f(attention(*given, sinks, 0.25, 9)), given)
        for f in (lambda out: (out * torch.ones_like(out)).sum(), torch.sum)
    )
    for one, other in zip(ones, expanded, strict=True):
        assert torch.equal(one, other)


def test_two_runs_give_the_same_bits():
    qkv = [x.clone().requires_grad_() for x in fused(2, 70, 6, 2, 16)]
    sinks = torch.randn(6, device=DEVICE)
    runs = [torch.autograd.grad(attention(*qkv, sinks, 0.25, 33).square().sum(), qkv) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("window", "packed"), [(128, False), (128, True), (1024, False), (1024, True)])
def test_gpt_oss_on_a_gpu(window, packed):
    bounds = torch.tensor([0, 7, 700, 1111, 1500, 2222], dtype=torch.int32, device=DEVICE) if packed else None
    check(fused(2, 1111, 64, 8, 64), torch.randn(64, device=DEVICE), window, bounds)
