"""Weighted sums of adapters against stock PEFT, which merges one after the other; and through the commands."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.parity.test_adapters import close, logits, randomise
from tests.stock import stock_base

from ossia.adapters.combine import combine
from ossia.adapters.inject import add_lora
from ossia.adapters.io import load_adapter, save_adapter
from ossia.adapters.origin import origin_of
from ossia.errors import OssiaError
from ossia.model.load import load_model
from ossia.train.adapters import one_adapter


def made(base, folder, std=0.2, **options):
    model = add_lora(load_model(base), **options)
    randomise(model, std)
    save_adapter(model, folder, str(base))
    return folder


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(3))


PAIRS = {
    "both whole": ({"rank": 4}, {"rank": 2, "use_rslora": True}),
    "attention and experts apart": (
        {"rank": 2, "target_modules": ["all-linear"], "target_experts": "none"},
        {"rank": 3, "target_modules": ["none"], "target_experts": "all"},
    ),
    "overlapping": (
        {"rank": 2, "target_modules": ["q_proj", "o_proj"], "target_experts": "0"},
        {"rank": 2, "target_modules": ["q_proj", "v_proj"], "target_experts": "0,1"},
    ),
}


@pytest.mark.parametrize(("pair", "rank"), [*zip(PAIRS, (6, 3, 4), strict=True)])
def test_sum_is_that_of_stock_peft(tiny_gpt_oss, tmp_path, ids, pair, rank):
    folders = [made(tiny_gpt_oss, tmp_path / str(n), **options) for n, options in enumerate(PAIRS[pair])]
    weights = [0.7, -0.4]
    stock = stock_base(tiny_gpt_oss)
    for folder, weight in zip(folders, weights, strict=True):
        adapted = PeftModel.from_pretrained(stock, folder)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(weight)
        stock = adapted.merge_and_unload()
    summed = combine(folders, weights, tmp_path / "sum")
    theirs = PeftModel.from_pretrained(stock_base(tiny_gpt_oss), summed)
    assert close(logits(load_adapter(load_model(tiny_gpt_oss), summed), ids), logits(theirs, ids))
    got, want = theirs.merge_and_unload().state_dict(), stock.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
    assert origin_of(summed) == origin_of(folders[0])
    assert json.loads((summed / "adapter_config.json").read_text())["r"] == rank


def test_one_adapter_is_itself_and_with_a_factor_scaled(tiny_gpt_oss, tmp_path, ids):
    folder = made(tiny_gpt_oss, tmp_path / "a", rank=2)
    with one_adapter([str(folder)], []) as same:
        assert same == folder
    with one_adapter([str(folder)], [0.0]) as nothing:
        assert close(
            logits(load_adapter(load_model(tiny_gpt_oss), nothing), ids), logits(load_model(tiny_gpt_oss), ids)
        )
    assert not nothing.exists()


def test_adapters_that_have_no_sum_are_named(tiny_gpt_oss, tiny_gpt_oss_other, tmp_path):
    one = made(tiny_gpt_oss, tmp_path / "one", rank=2)
    other = made(tiny_gpt_oss_other, tmp_path / "other", rank=2)
    with pytest.raises(OssiaError, match=r"one and .*other were trained on different base models"):
        combine([one, other], [1, 1], tmp_path / "sum")
    tensors = load_file(other / "adapter_model.safetensors")
    name = min(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, other / "adapter_model.safetensors")
    with pytest.raises(OssiaError, match="are of different base models"):
        combine([one, other], [1, 1], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.fixture(scope="module")
def tiny_gpt_oss_other(tmp_path_factory):
    return tiny.gpt_oss(tmp_path_factory.mktemp("other") / "base", seed=5)


def test_through_the_commands(ossia, tiny_gpt_oss, tmp_path):
    folders = [made(tiny_gpt_oss, tmp_path / f"checkpoint-{n}", rank=n, std=0.1) for n in (1, 2)]
    two, out = ["--adapters", *folders, "--adapter_weights"], tmp_path / "merged"
    more = ["--merge_lora", "true", "--format", "bf16", "--torch_dtype", "float32", "--output_dir", out]
    assert "verified" in ossia.ok("export", *two, 0.5, 2, *more).splitlines()
    card = (out / "README.md").read_text()
    assert "- 0.5 × checkpoint-1\n- 2.0 × checkpoint-2\n" in card
    assert "--output_dir" in ossia.fails(2, "export", *two, 1, 1, "--merge_lora", "true")
    assert "1 numbers for 2 --adapters" in ossia.fails(2, "export", *two, 1, *more)
    assert "goes with --merge_lora true" in ossia.fails(
        2, "export", *two[:2], "--adapter_weights", 2, "--push_to_hub", "a/b"
    )
    assert "--adapter_weights got 'half'" in ossia.fails(2, "infer", *two, 1, "half")


@pytest.mark.parametrize("stock", [False, True])
def test_training_goes_on_from_an_adapter(ossia, tiny_gpt_oss, rows, tmp_path, stock):
    start = tmp_path / "start"
    if stock:
        made_by_peft = get_peft_model(
            stock_base(tiny_gpt_oss),
            LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=[
                "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]),
        )  # fmt: skip
        randomise(made_by_peft, 0.1)
        made_by_peft.save_pretrained(start)
    else:
        made(tiny_gpt_oss, start, rank=3, alpha=5.0, target_modules=["q_proj"], target_experts="1", std=0.1)
    run = tmp_path / "run"
    more = ["--dataset", rows, "--output_dir", run, "--add_version", "false", "--max_steps", 1, "--device", "cpu"]
    model = ["--model", tiny_gpt_oss] if stock else []
    said = ossia.ok("sft", *model, "--adapters", start, *more, "--learning_rate", 1e-12)
    assert f"going on from {start} (rank 3, alpha 5)" in said
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, run / "checkpoint-1"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    settings = json.loads((run / "checkpoint-1" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (3, 5, ["q_proj"])
    assert "--lora_rank 4: the adapter in" in ossia.fails(
        2, "sft", *model, "--adapters", start, *more, "--lora_rank", 4
    )
    assert "no such folder" in ossia.fails(2, "sft", *model, "--adapters", tmp_path / "none", *more)
