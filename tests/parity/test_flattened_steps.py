"""The rows of an optimizer step in few passes give the loss and the gradient of the same rows one by one."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from transformers import AutoModelForCausalLM, Mxfp4Config

from ossia.adapters.inject import add_lora
from ossia.config import SftConfig
from ossia.data.collate import Collator, on_device
from ossia.data.passes import Passes
from ossia.data.store import TokenRow
from ossia.model import loss as plain_loss
from ossia.model.gpt_oss import ExpertLoad
from ossia.model.load import load_model
from ossia.track import read_metrics
from ossia.train import trainer
from ossia.train.run import run

LENGTHS = [31, 3, 17, 90, 12, 29, 30, 8, 2, 55, 31, 1]
lengths_of_steps = st.lists(st.integers(1, 400), min_size=1, max_size=40)


def row(length, rng, weightless=False):
    ids, labels = (rng.integers(1, 250, length).astype(np.int32) for _ in range(2))
    weights = np.zeros(length) if weightless else rng.random(length) * (rng.random(length) < 0.7)
    return TokenRow(ids, labels, weights.astype(np.float32))


def rows():
    """Of uneven lengths, one of them longer than several others together, one of weight 0, one of a single token."""
    rng = np.random.default_rng(0)
    return [row(length, rng, weightless=number == 5) for number, length in enumerate(LENGTHS)]


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_steps, capacity=st.integers(1, 3000), least=st.integers(1, 6), end_to_end=st.booleans())
def test_every_row_is_in_one_pass_that_holds_it(lengths, capacity, least, end_to_end):
    passes = Passes(0, capacity, end_to_end)
    groups = passes.groups(lengths, least)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert len(groups) >= least
    computed = [passes.computed([lengths[row] for row in group]) for group in groups if group]
    assert all(tokens <= max(capacity, *lengths) for tokens in computed)
    if end_to_end:
        assert sum(computed) <= sum(lengths) / 0.97
        short = [length for length in lengths if length <= capacity]
        assert len(passes.groups(lengths)) <= len(lengths) - len(short) + 1 + 2 * sum(short) // capacity


def test_full_passes_are_filled_evenly():
    groups = Passes(0, 1000).groups([100] * 11)
    assert sorted(map(len, groups)) == [5, 6]
    assert len(Passes(0, 1100).groups([100] * 11)) == 1
    assert [len(group) for group in Passes(0, 10_000, span=200).groups([300, 100, 100])] == [1, 2]


def test_rows_of_one_length_stand_side_by_side():
    rng = np.random.default_rng(0)
    alike, uneven = ([row(length, rng) for length in lengths] for lengths in ((40, 40, 39), (40, 20, 39)))
    assert Passes(0, 200).batch(alike)["input_ids"].shape == (3, 40)
    assert "attention_mask" in Passes(0, 200).batch(alike)
    assert Passes(0, 200).batch(uneven)["input_ids"].shape == (1, 99)
    assert Passes(0, 4096).batch(alike * 20)["input_ids"].shape == (60, 40)
    assert Passes(0, 2384).batch(alike * 20)["input_ids"].shape == (1, 2384)
    assert Passes(0, 2382).batch(alike * 20)["input_ids"].shape == (1, 2382)
    assert Passes(0, 4096).batch(uneven * 20)["input_ids"].shape == (1, 1984)


@pytest.fixture(scope="module", params=["gpt-oss", "llama"])
def model(request, tiny_gpt_oss, tiny_llama):
    torch.manual_seed(0)
    base = load_model(tiny_gpt_oss if request.param == "gpt-oss" else tiny_llama, device="cpu")
    experts = "all" if request.param == "gpt-oss" else "none"
    adapted = add_lora(base, rank=4, alpha=16, target_modules=["all-linear"], target_experts=experts)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def step(model, batches):
    """Loss, right guesses, tokens and gradient of a step of these batches."""
    model.zero_grad()
    loss = correct = tokens = 0.0
    for batch in batches:
        sums = trainer.sums_of(model, batch)
        sums.loss.backward()
        loss, correct, tokens = loss + sums.loss.item(), correct + sums.correct.item(), tokens + batch["tokens"]
        assert sums.losses.sum().item() == pytest.approx(sums.loss.item(), rel=1e-5, abs=1e-6)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return (loss, correct, tokens), gradient


def test_one_by_one_padded_and_flattened_are_one_step(model):
    found = rows()
    sums, exact = step(model, [Collator(0)([each]) for each in found])
    assert exact.norm() > 1
    ways = {
        "all padded": [Collator(0)(found)],
        "flattened into one": Passes(0, 10_000).batches(found),
        "flattened into several": Passes(0, 100).batches(found),
        "each row over the capacity": Passes(0, 1).batches(found),
        "short sequences": Passes(0, 10_000, span=40).batches(found),
        "as many as other processes have": Passes(0, 10_000).batches(found, least=15),
        "padded by length": Passes(0, 120, end_to_end=False).batches(found),
    }
    assert [len(batches) for batches in ways.values()] == [1, 1, 4, 12, 7, 15, 10]
    for way, batches in ways.items():
        got, gradient = step(model, batches)
        assert got == pytest.approx(sums, rel=1e-5), way
        assert (gradient - exact).norm() <= 1e-5 * exact.norm(), way


def test_the_host_does_not_wait_for_the_loss(model, monkeypatch):
    """Where the loss is, the batch says; looking for it would wait for the whole forward pass on a GPU."""
    batches = [*Passes(0, 100).batches(rows()), Collator(0)(rows())]
    expected = [trainer.sums_of(model, {k: v for k, v in b.items() if k != "kept"}).loss.item() for b in batches]

    def refuse(*args, **kwargs):
        raise AssertionError("the host waits")

    monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
    monkeypatch.setattr(torch, "nonzero", refuse)
    assert [trainer.sums_of(model, batch).loss.item() for batch in batches] == expected


def test_padding_is_no_experts_load(tiny_gpt_oss):
    model = load_model(tiny_gpt_oss, device="cpu")
    load, found = ExpertLoad(model), rows() * 12
    load.counting = True
    batches = Passes(0, 10_000).batches(found)
    assert batches[0]["input_ids"].numel() > batches[0]["tokens"]
    counts = []
    for made in (batches, [Collator(0)([each]) for each in found]):
        load.counts_LEK.zero_()
        for batch in made:
            trainer.sums_of(model, batch)
        counts.append(load.counts_LEK.clone())
    assert torch.equal(*counts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA GPU")
def test_flattened_and_one_by_one_are_one_step_on_the_flash_path(tmp_path):
    # Of small weights: with larger ones bfloat16 alone moves gradients by a tenth.
    base = load_model(
        tiny.gpt_oss(tmp_path / "model", spread=0.1), device="cuda", torch_dtype="bfloat16", attn_impl="flash"
    )
    torch.manual_seed(0)
    adapted = add_lora(base, rank=4, alpha=16, target_modules=["all-linear"], target_experts="all")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    rng = np.random.default_rng(0)
    found = [*rows(), *(row(int(length), rng) for length in rng.integers(2, 300, 20))]
    device = torch.device("cuda")
    ways = {
        "one by one": [Collator(0)([each]) for each in found],
        "in one": Passes(0, 100_000).batches(found),
        "in several": Passes(0, 900).batches(found),
    }
    steps = {}
    with torch.autocast("cuda", torch.bfloat16):
        for way, batches in ways.items():
            steps[way] = step(adapted, [on_device(batch, device) for batch in batches])
    (loss, _, tokens), exact = steps.pop("one by one")
    for way, (sums, gradient) in steps.items():
        assert sums[0] == pytest.approx(loss, rel=2e-3), way
        assert sums[2] == tokens
        assert (gradient - exact).norm() < 3e-2 * exact.norm(), way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are a GPU's")
def test_a_pass_never_waits_for_the_gpu(tmp_path):
    base = load_model(tiny.gpt_oss(tmp_path / "model"), device="cuda", torch_dtype="bfloat16", attn_impl="flash")
    adapted = add_lora(base, rank=4, alpha=16, target_modules=["all-linear"], target_experts="all")
    device = torch.device("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            [batch] = Passes(0, 10_000).batches(rows())
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.sums_of(adapted, on_device(batch, device)).loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


# runs


@pytest.fixture
def uneven(tmp_path):
    """Rows of 15 to 200 tokens, every fourth of them long."""
    path = tmp_path / "uneven.jsonl"
    turns = [
        [
            {"role": "user", "content": "x" * (n * 7 % 31 + 1)},
            {"role": "assistant", "content": "z" * (90 * (n % 4 == 3) + n + 1)},
        ]
        for n in range(13)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture
def options(uneven, tmp_path):
    return SftConfig(
        dataset=[str(uneven)],
        val_dataset=[str(uneven)],
        output_dir=str(tmp_path / "run"),
        device="cpu",
        torch_dtype="float32",
        learning_rate=1e-2,
        max_grad_norm=1e9,
        gradient_accumulation_steps=4,
        eval_on_start=True,
        logging_steps=1,
        save_strategy="no",
        sample_prompts=0,
        load_from_cache_file=False,
    )


def train(config, monkeypatch, passes=None):
    """Figures of each step, and the shapes that went through the model while it trained; `passes` in place of its own."""
    shapes, real = [], trainer.sums_of

    def sums_of(model, inputs, *rest):
        if model.training:
            shapes.append(tuple(inputs["input_ids"].shape))
        return real(model, inputs, *rest)

    monkeypatch.setattr(trainer, "sums_of", sums_of)
    if passes is not None:
        monkeypatch.setattr(trainer, "default_passes", lambda *args: passes)
    done = run(config)
    monkeypatch.undo()
    return list(read_metrics(done.run_dir / "metrics.jsonl")), shapes


KEYS = ("loss", "eval_loss", "grad_norm", "token_accuracy", "eval_token_accuracy", "trained_tokens", "loss/final")
KEYS += ("expert_load/busiest",)


@pytest.mark.parametrize(("name", "passes"), [("gpt-oss", 9), ("llama", 4)])
def test_a_run_takes_few_passes_and_learns_the_same(
    name, passes, tiny_gpt_oss, tiny_llama, options, monkeypatch, tmp_path
):
    options = dataclasses.replace(options, model=str(tiny_gpt_oss if name == "gpt-oss" else tiny_llama))
    got, shapes = train(options, monkeypatch)
    options = dataclasses.replace(options, output_dir=str(tmp_path / "loop"))
    expected, loop = train(options, monkeypatch, Passes(0, 1))
    assert len(loop) == 13
    assert len(shapes) == passes
    assert max(count * length for count, length in shapes) <= 512
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for one, other in zip(got, expected, strict=True):
        for key in KEYS:
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=2e-5), key
    assert sum("loss" in row for row in got) == 4


def test_a_model_that_mixes_rows_gets_them_padded_and_it_is_said(tiny_gpt_oss, options, monkeypatch, capsys):
    leaky = AutoModelForCausalLM.from_pretrained(tiny_gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
    monkeypatch.setattr("ossia.model.load.load_model", lambda *args, **kwargs: leaky.float())
    config = dataclasses.replace(options, model=str(tiny_gpt_oss), target_experts="none", per_device_train_batch_size=2)
    config.gradient_accumulation_steps, config.log_expert_load = 2, False
    _, shapes = train(config, monkeypatch)
    said = capsys.readouterr().out
    assert said.count("rows are padded, short ones apart from long: GptOssForCausalLM lets rows that lie") == 1
    assert len(shapes) <= 7
    assert max(count * length for count, length in shapes) <= 2 * max(length for _, length in shapes)


def test_logits_of_others_are_not_copied(monkeypatch):
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    weights = torch.tensor([[1.0, 0, 0.5, 2, 0], [0, 0, 0, 0, 3]])
    got = plain_loss.loss_from_logits(logits, labels, weights, 0.1)
    each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none", label_smoothing=0.1)
    assert torch.allclose(got.loss, (each * weights[:, 1:]).sum())
    assert torch.allclose(got.losses[:, :-1], each * weights[:, 1:])
    assert got.losses[:, -1].eq(0).all()
