"""The fused training path against the general one in float32, by every plan: on a CPU through Triton's interpreter.

The general path is compared with transformers and stock PEFT elsewhere (test_model.py, test_adapters.py).
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from ossia.adapters import experts as adapter_experts
from ossia.adapters import linear
from ossia.adapters.inject import add_lora
from ossia.kernels.expert_mlp import frozen
from ossia.model import experts
from ossia.model import gpt_oss as model_gpt_oss
from ossia.model.load import load_model
from ossia.train.plan import Plan, Sizes
from ossia.train.recompute import apply_plan

pytest.importorskip("triton")
from ossia.kernels.qkv import fused

PLANS = {
    "none": {},
    "experts": {"recompute": "experts"},
    "layer": {"recompute": "layer"},
    "layer, reusing": {"recompute": "layer", "reuse_expanded": True},
    "experts, reusing": {"recompute": "experts", "reuse_expanded": True},
    "parts": {"experts_at_once": 3, "loss_chunk": 7},
    "layer in parts": {"recompute": "layer", "experts_at_once": 1},
}


@pytest.fixture
def interpreted(monkeypatch):
    """Everything that a GPU would run in Triton runs there, on CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("test_fused_gpu.py runs the real thing")
    from ossia.kernels.expert_mlp import triton as expert_kernels
    from ossia.kernels.rms_norm import triton as norm_kernels
    from ossia.kernels.rope import triton as rope_kernels
    from ossia.kernels.route import triton as route_kernels

    for module in (experts, adapter_experts, linear):
        monkeypatch.setattr(module, "fuses", lambda hidden: True)
    monkeypatch.setattr(frozen, "write_adapter", expert_kernels.write_adapter)
    for name in ("rms_norm", "add_rms_norm"):
        monkeypatch.setattr(model_gpt_oss, name, getattr(norm_kernels, name))
    monkeypatch.setattr(model_gpt_oss, "route", route_kernels.route)
    monkeypatch.setattr("ossia.model.attention.rope", rope_kernels.rope)


def step(folder, plan=None):
    """Loss, right guesses and every LoRA gradient."""
    torch.manual_seed(0)
    model = add_lora(load_model(folder, experts="mxfp4"), rank=5, alpha=8).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if plan is not None:
        apply_plan(model, plan)
    ids, weights = torch.randint(0, 250, (2, 21)), torch.rand(2, 21)
    out = model(input_ids=ids, labels=ids, loss_weights=weights)
    out.loss.backward()
    return out.loss.item(), out.correct.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_loss_and_gradients_of_the_general_path(tiny_gpt_oss, request, monkeypatch, name):
    loss, correct, grads = step(tiny_gpt_oss)
    request.getfixturevalue("interpreted")
    together = mock.Mock(side_effect=fused.qkv)
    monkeypatch.setattr(fused, "qkv", together)
    options = dict(PLANS[name])
    kinds = (options.pop("recompute", "none"),) * 2
    plan = Plan(Sizes(2, 64, 32, 4, 2, 4, 2, 16, 266, 42, 5, 1), kinds, 0, **options)
    got = step(tiny_gpt_oss, plan)
    assert together.call_count == (4 if kinds[0] == "layer" else 2)
    assert got[:2] == (pytest.approx(loss, rel=1e-5), correct)
    assert grads.keys() == got[2].keys()
    for key, grad in grads.items():
        assert (got[2][key] - grad).norm() <= 1e-4 * grad.norm(), key


def test_stacked_weights_are_the_same_and_come_apart_when_moved(tiny_gpt_oss):
    model = load_model(tiny_gpt_oss, experts="mxfp4", torch_dtype="bfloat16")
    attention = model.model.layers[0].self_attn
    parts = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    before = [part.clone() for part in parts]
    attention.stack()
    assert all(torch.equal(*pair) for pair in zip(parts, before, strict=True))
    starts = [part.data_ptr() for part in parts]
    assert starts[1:] == [start + 2 * part.numel() for start, part in zip(starts[:2], parts, strict=False)]
    model.to(model.device)
    assert attention._stacked is not None
    model.float()
    assert attention._stacked is None


def test_a_layer_computed_again_drops_the_same(tiny_gpt_oss):
    ids, weights = torch.randint(0, 250, (2, 21)), torch.rand(2, 21)
    results = []
    for kind in ("none", "layer"):
        torch.manual_seed(0)
        model = add_lora(load_model(tiny_gpt_oss, experts="mxfp4"), rank=5, dropout=0.4).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        sizes = Sizes(2, 64, 32, 4, 2, 4, 2, 16, 266, 42, 5, 1, fused=False)
        apply_plan(model, Plan(sizes, (kind,) * 2, 0), dropout=True)
        loss = model(input_ids=ids, labels=ids, loss_weights=weights).loss
        loss.backward()
        # What is drawn afterwards does not depend on it either.
        results.append((loss, torch.rand(1), *(p.grad for p in model.parameters() if p.requires_grad)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
