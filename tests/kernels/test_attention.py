"""Attention with sinks: the reference against transformers, flash against the reference, gradients included."""

from __future__ import annotations

import importlib
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ossia.kernels import attention


def case(batch, length, heads, kv_heads, size, dtype, device="cpu"):
    torch.manual_seed(length)
    shapes = ((heads,), (kv_heads,), (kv_heads,))
    q, k, v = (torch.randn(batch, length, *n, size, device=device).to(dtype).requires_grad_() for n in shapes)
    return q, k, v, torch.randn(heads, device=device) * 2


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_reference_equals_transformers(window):
    q, k, v, sinks = case(2, 23, 6, 2, 16, torch.float32)
    distance = torch.arange(23)[:, None] - torch.arange(23)
    mask = torch.zeros(23, 23).masked_fill((distance < 0) | (distance >= (window or 23)), float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 3, sinks
    expected, _ = eager_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask[None, None], 0.25)
    assert torch.allclose(attention.reference(q, k, v, sinks, 0.25, window), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["reference", "triton"])
@pytest.mark.parametrize(("batch", "length", "heads"), [(2, 77, 3), (1, 1, 1), (1, 64, 2)])
def test_sinks_take_their_share_of_an_answer_and_of_its_sum(kind, batch, length, heads):
    if kind == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module(f"ossia.kernels.attention.sinks{'_triton' if kind == 'triton' else ''}")
    apply_ = module.apply_sinks_ if kind == "triton" else module.reference_
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(length)
    out = torch.randn(batch, length, heads, 16, device=device).transpose(1, 2)
    lse, sinks = torch.randn(batch, heads, length, device=device) * 40, torch.randn(heads, device=device) * 40
    exact, total = out.double(), lse.double().logaddexp(sinks.double()[:, None])
    exact *= (lse - total).exp()[..., None]
    apply_(out, lse, sinks)
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-6)
    assert torch.allclose(lse.double(), total, rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 128, 7])
@pytest.mark.parametrize("length", [1, 77, 300])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["flash", "fastest", "cudnn"])
def test_on_a_gpu_with_gradients_against_float64(kind, length, window, packed):
    if kind == "cudnn" and (packed or length == 1 or window or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("cuDNN takes whole sequences, on Hopper or newer")
    q, k, v, sinks = case(2, length, 8, 2, 64, torch.bfloat16, "cuda")
    bounds = longest = None
    if packed:
        places = sorted({0, length // 7, length // 2, length, length + length // 3, 2 * length})
        longest = max(end - start for start, end in pairwise(places))
        bounds = torch.tensor(places, dtype=torch.int32, device="cuda")
    inputs = (q, k, v, sinks, 0.125, window, bounds)
    if kind == "flash":
        out = attention.flash(*inputs, longest)
    else:
        out = attention.fastest(*inputs, longest, whole_by_cudnn=kind == "cudnn")
    probe = torch.randn_like(out)
    out.backward(probe)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = attention.reference(*exact, sinks, 0.125, window, bounds)
    expected.backward(probe.double())
    pairs = [(out, expected), *((x.grad, e.grad) for x, e in zip((q, k, v), exact, strict=True))]
    for got, want in pairs:
        assert (got.double() - want).norm() <= 1e-2 * want.norm() + 1e-9


def test_cudnn_is_worth_a_plan_once_a_shape_has_come_often(monkeypatch):
    monkeypatch.setattr(attention, "_has_cudnn", lambda device: True)
    monkeypatch.setattr(attention, "_spent", Counter())
    device = torch.device("cuda")
    assert [attention.worth_cudnn(4, 4096, device) for _ in range(4)] == [False, False, True, True]
    assert attention.worth_cudnn(1, 131072, device)
    assert not any(attention.worth_cudnn(1, length, device) for length in range(1, 300))
