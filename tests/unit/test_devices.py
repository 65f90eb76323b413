"""What older and newer GPUs are told, without having them."""

from __future__ import annotations

import pytest
import torch

from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.model import load
from ossia.model.sizes import SIZES
from ossia.train.pace import Steps
from ossia.train.run import needs_autocast, plan_for


@pytest.fixture
def gpu(monkeypatch):
    def of(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
        return torch.device("cuda", 0)

    return of


def test_before_ampere_bfloat16_is_refused_with_the_way_out(gpu):
    for wanted in ("auto", "bfloat16"):
        with pytest.raises(
            UsageError, match=r"a card \(compute capability 7\.5\) has no bfloat16.*--torch_dtype float32"
        ):
            load.pick_dtype(wanted, gpu(7, 5))
    assert load.pick_dtype("float32", gpu(7, 5)) == torch.float32
    assert load.pick_dtype("auto", gpu(8, 0)) == torch.bfloat16
    assert load.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_what_is_slow_is_said(gpu, monkeypatch):
    assert load.path_lines(gpu(9, 0), dropout=False) == ["kernels: attention by Triton in windows, cuDNN elsewhere"]
    ampere = "\n".join(load.path_lines(gpu(8, 6), dropout=True))
    assert "FlashAttention 2 elsewhere" in ampere
    assert "--lora_dropout" in ampere
    assert "one by one below compute capability 9.0 (slow)" in ampere
    monkeypatch.setattr(load, "HAS_TRITON", False)
    assert "Triton is not installed" in "\n".join(load.path_lines(gpu(9, 0), dropout=False))


STEPS = Steps.of([1024] * 40, 4, [512])
TARGETS = ([f"layers.{layer}.self_attn.q_proj" for layer in range(24)], list(range(24)))


def plan(device, monkeypatch, **options):
    """`plan_for` before a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80_000_000_000, 85_000_000_000))
    config = SftConfig(per_device_train_batch_size=4, **options)
    return plan_for(config, SIZES["20b"], True, TARGETS, STEPS, device, torch.bfloat16)


def test_a_plan_says_what_it_does(gpu, monkeypatch, capsys):
    made = plan(gpu(9, 0), monkeypatch, memory_budget="17GB", gradient_checkpointing="true")
    assert (made.sizes.tokens, made.sizes.eval_tokens, made.sizes.fused) == (4096, 512, True)
    assert not needs_autocast(torch.bfloat16, made)
    said = capsys.readouterr().out
    assert "of 17.0 GB" in said
    assert "in host memory: the embedding" in said
    assert "of 24 layers 24 are computed again in backward" in said


def test_a_plan_takes_what_is_free_but_no_more(gpu, monkeypatch):
    assert plan(gpu(9, 0), monkeypatch).budget == 0.94 * 80e9
    with pytest.raises(UsageError, match=r"--memory_budget 81GB: this GPU has 80\.0 GB free"):
        plan(gpu(9, 0), monkeypatch, memory_budget="81GB")


def test_dropout_is_planned_without_fusion(gpu, monkeypatch):
    made = plan(gpu(9, 0), monkeypatch, lora_dropout=0.1)
    assert not made.sizes.fused
    assert needs_autocast(torch.bfloat16, made)


def test_other_models_and_devices_have_no_plan(gpu, capsys):
    config = SftConfig(memory_budget="16GB")
    llama = {"model_type": "llama"}
    cases = ((SIZES["20b"], torch.device("cpu"), torch.float32), (llama, gpu(9, 0), torch.bfloat16))
    for model, device, dtype in cases:
        assert plan_for(config, model, True, TARGETS, STEPS, device, dtype) is None
    assert capsys.readouterr().out.count("--memory_budget: no effect here") == 2
