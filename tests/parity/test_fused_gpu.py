"""On a GPU: the fused bfloat16 step is no farther from float32 than transformers' own bfloat16 step."""

from __future__ import annotations

import pytest
import torch
from benchmarks.train.fidelity import compare
from tests import tiny

from ossia.adapters.inject import add_lora
from ossia.model.load import load_model
from ossia.train.plan import Plan, Sizes
from ossia.train.recompute import apply_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("experts", ["all", "none"])
def test_errors_are_no_larger_than_transformers(tmp_path, experts):
    model = tiny.gpt_oss(tmp_path / "model", layers=4, spread=0.1)
    result = compare(model, "cuda", (3, 70), experts)
    ours, theirs = result["ossia"], result["transformers bfloat16"]
    for what in ("logits", "gradients"):
        assert ours[what] <= theirs[what], (what, result)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "none"},
        {"recompute": "experts"},
        {"recompute": "layer"},
        {"recompute": "layer", "reuse_expanded": True},
        {"recompute": "layer", "inputs_on_host": True},
        {"recompute": "none", "experts_at_once": 3},
        {"recompute": "layer", "host_layers": 1, "embedding_on_host": True, "loss_chunk": 7},
        {"recompute": "none", "held_layers": 2},
    ],
)
def test_every_plan_computes_the_same(tiny_gpt_oss, options):
    ids = torch.randint(0, 250, (2, 45), generator=torch.Generator().manual_seed(0)).cuda()
    sizes = Sizes(2, 64, 32, 4, 2, 4, 2, 16, 266, ids.numel(), 8, 1)

    def step(plan):
        loaded = load_model(tiny_gpt_oss, offload=plan.offload())
        torch.manual_seed(1)
        model = add_lora(loaded, rank=8).train()
        apply_plan(model, plan)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = model(input_ids=ids, labels=ids, loss_weights=torch.ones_like(ids, dtype=torch.float32)).loss
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = step(Plan(sizes, ("none",) * 2, 0))
    got = step(Plan(sizes, (options.pop("recompute"),) * 2, 0, **options))
    assert got[0] == pytest.approx(plain[0], rel=1e-3)
    for name, grad in plain[1].items():
        assert (got[1][name] - grad).norm() <= 2e-2 * grad.norm(), name


def test_dropout_trains_from_host_memory_too(tiny_gpt_oss):
    ids = torch.randint(0, 250, (1, 33)).cuda()
    sizes = Sizes(2, 64, 32, 4, 2, 4, 2, 16, 266, ids.numel(), 8, 1, fused=False)
    plan = Plan(sizes, ("layer", "none"), 0, host_layers=1)
    model = add_lora(load_model(tiny_gpt_oss, offload=plan.offload()), rank=8, dropout=0.1).train()
    apply_plan(model, plan, dropout=True)
    model(input_ids=ids, labels=ids, loss_weights=torch.ones_like(ids, dtype=torch.float32)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
