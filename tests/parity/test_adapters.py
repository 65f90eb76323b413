"""Our adapters against stock PEFT on transformers' dequantized model, in float32, both ways; and merged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.stock import stock_base

from ossia.adapters.inject import add_lora, coverage
from ossia.adapters.io import load_adapter, save_adapter
from ossia.errors import OssiaError, UsageError
from ossia.export.merge import merge
from ossia.model.load import load_model

CHOICES = {
    "all": ("all-linear", "all"),
    "attention": ("all-linear", "none"),
    "one layer": ("q_proj", "1"),
    "experts": ("none", "all"),
}


def randomise(model, std=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() < tolerance * b.abs().max()


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(0, 256, (2, 29))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("choice", list(CHOICES))
def test_ours_loads_in_stock_peft_and_back(tiny_gpt_oss, tmp_path, ids, choice, rslora):
    modules, experts = CHOICES[choice]
    base = logits(load_model(tiny_gpt_oss), ids)
    model = add_lora(
        load_model(tiny_gpt_oss),
        rank=3,
        alpha=7,
        dropout=0.1,
        use_rslora=rslora,
        target_modules=[modules],
        target_experts=experts,
    ).eval()
    assert torch.equal(logits(model, ids), base), "a fresh adapter must change nothing"
    randomise(model)
    ours = logits(model, ids)
    assert not close(ours, base, 1e-2)
    save_adapter(model, tmp_path / "adapter", str(tiny_gpt_oss))
    stock = PeftModel.from_pretrained(stock_base(tiny_gpt_oss), tmp_path / "adapter").eval()
    assert close(ours, logits(stock, ids))
    assert torch.equal(logits(load_adapter(load_model(tiny_gpt_oss), tmp_path / "adapter"), ids), ours)


@pytest.mark.parametrize(
    "parameters",
    [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]],
)
def test_stock_peft_adapter_loads_in_ours(tiny_gpt_oss, tmp_path, ids, parameters):
    config = LoraConfig(r=5, lora_alpha=9, target_modules=["q_proj", "o_proj"], target_parameters=parameters)
    stock = get_peft_model(stock_base(tiny_gpt_oss), config).eval()
    randomise(stock)
    stock.save_pretrained(tmp_path)
    assert close(logits(load_adapter(load_model(tiny_gpt_oss), tmp_path), ids), logits(stock, ids))


def test_gradients_equal_stock_peft(tiny_gpt_oss, tmp_path, ids):
    model = add_lora(load_model(tiny_gpt_oss, experts="mxfp4"), rank=4)
    randomise(model, 0.1)
    save_adapter(model, tmp_path, str(tiny_gpt_oss))
    stock = PeftModel.from_pretrained(stock_base(tiny_gpt_oss), tmp_path, is_trainable=True)
    for network in (model, stock):
        network.train()
        out = network(ids, attention_mask=torch.ones_like(ids)).logits
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()

    def grads(network):
        """Gradients through the layout on disk, where both have the same names."""
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.grad
        return network

    save_adapter(grads(model), tmp_path / "ours")
    grads(stock).save_pretrained(tmp_path / "stock")
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "stock"))
    assert set(ours) == set(theirs)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name


@pytest.mark.parametrize("choice", list(CHOICES))
def test_merged_equals_adapter_without_ossia(tiny_gpt_oss, tmp_path, ids, choice):
    modules, experts = CHOICES[choice]
    model = add_lora(load_model(tiny_gpt_oss), rank=4, target_modules=[modules], target_experts=experts).eval()
    randomise(model, 0.1)
    save_adapter(model, tmp_path / "adapter", str(tiny_gpt_oss))
    merged = merge(tiny_gpt_oss, tmp_path / "adapter", tmp_path / "merged", torch.float32, 100_000)
    torch.save(ids, tmp_path / "ids.pt")
    # A process of its own, which never sees this package.
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m, info = A.from_pretrained({str(merged)!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
        f"torch.save(m.eval()(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'ossia' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert close(torch.load(tmp_path / "logits.pt"), logits(model, ids))
    assert close(logits(load_model(merged), ids), logits(model, ids))


def test_targets_that_match_nothing_name_near_misses(tiny_gpt_oss):
    model = load_model(tiny_gpt_oss)
    with pytest.raises(UsageError, match=r"q_prj.*did you mean 'q_proj'"):
        add_lora(model, target_modules=["q_prj"])
    with pytest.raises(UsageError, match="no layer 9; this model's layers are 0 to 1"):
        add_lora(model, target_experts="0,9")
    with pytest.raises(UsageError, match="nothing to train"):
        add_lora(model, target_modules=["none"], target_experts="none")


def test_experts_on_a_model_without_any(tiny_llama):
    with pytest.raises(UsageError, match="no gpt-oss experts"):
        add_lora(load_model(tiny_llama), target_experts="all")


def test_coverage_counts_every_trained_parameter(tiny_gpt_oss):
    model = add_lora(load_model(tiny_gpt_oss), rank=8)
    rows = {kind: (count, lora, base) for kind, count, lora, base in coverage(model)}
    assert rows["mlp.experts"] == (2, 2 * 4 * 8 * (64 + 64 + 32 + 64), 2 * 4 * (64 * 64 + 32 * 64))
    assert sum(row[1] for row in rows.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapter_of_another_base_is_refused(tiny_gpt_oss, tmp_path):
    from tests import tiny

    other = tiny.gpt_oss(tmp_path / "other", hidden=96)
    save_adapter(add_lora(load_model(other), rank=4), tmp_path / "adapter", str(other))
    with pytest.raises(OssiaError, match="adapter of another base model"):
        load_adapter(load_model(tiny_gpt_oss), tmp_path / "adapter")
    with pytest.raises(OssiaError, match="adapter of another base model"):
        merge(tiny_gpt_oss, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16, 10**9)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*part"))


def test_dropout_is_not_written_where_stock_peft_would_refuse_it(tiny_gpt_oss, tmp_path):
    save_adapter(add_lora(load_model(tiny_gpt_oss), dropout=0.5), tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
