"""What is looked at beside training: loss by channel, experts' load, gradients by part, sample answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ossia.adapters.inject import add_lora
from ossia.data.store import CHANNELS, TokenRow
from ossia.kernels.linear_cross_entropy import linear_cross_entropy
from ossia.model.gpt_oss import ExpertLoad, Router
from ossia.model.load import load_model
from ossia.model.loss import loss_from_logits
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template
from ossia.template.messages import Conversation, Message, Reply, ToolCall
from ossia.train.insight import GradientCallback, SampleCallback, gradient_groups
from ossia.train.trainer import _split, _Sums


@pytest.fixture
def model(tiny_gpt_oss):
    torch.manual_seed(0)
    return add_lora(load_model(tiny_gpt_oss, device="cpu", torch_dtype="float32"), rank=4)


def batch(lengths=(9, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, 250, shape, generator=generator)
    mask = torch.stack([torch.arange(shape[1]) < length for length in lengths]).long()
    weights = torch.rand(shape, generator=generator) * mask * (torch.arange(shape[1]) > 2)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask, "loss_weights": weights}


def test_losses_by_position_are_the_terms_of_the_sum():
    torch.manual_seed(0)
    hidden, head, weights = torch.randn(7, 8), torch.randn(11, 8), torch.tensor([0, 1, 0.5, 0, 2, 1, 0])
    labels, losses = torch.randint(0, 11, (7,)), torch.full((7,), 3.0)
    loss, _ = linear_cross_entropy(hidden, head, labels, weights, 2, 0.1, losses)
    expected = weights * torch.nn.functional.cross_entropy(
        hidden @ head.T, labels, reduction="none", label_smoothing=0.1
    )
    kept = weights > 0
    torch.testing.assert_close(losses[kept], expected[kept])
    assert (losses[~kept] == 3).all()
    torch.testing.assert_close(loss, expected.sum())


def test_loss_by_channel_on_both_paths(model):
    rows = batch()
    channels = (torch.arange(9) // 3).repeat(2, 1).to(torch.uint8)
    with torch.no_grad():
        ours = model(**rows)
        plain = {name: rows[name] for name in ("input_ids", "attention_mask")}
        theirs = loss_from_logits(model(**plain, use_cache=False).logits, rows["labels"], rows["loss_weights"])
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-5)
    sums = _Sums()
    sums.add(ours, rows["loss_weights"][:, 1:], channels)
    sums.add(ours, rows["loss_weights"][:, 1:], channels)
    (loss, weight, _, _), parts = _split(sums.tensor(torch.device("cpu")))
    assert set(parts) == {"analysis", "commentary"}, "tokens 3 to 8 carry weight"
    assert sum(part for part, _ in parts.values()) == pytest.approx(loss)
    assert sum(of for _, of in parts.values()) == pytest.approx(weight)
    place = channels[:, 1:] == CHANNELS.index("analysis")
    assert parts["analysis"][0] == pytest.approx(2 * float(ours.losses[:, :-1][place].sum()))


def test_experts_are_counted_without_padding_and_only_when_asked(model):
    load, seen = ExpertLoad(model), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].clone()))
    rows = batch()
    with torch.no_grad():
        model(**rows)
        assert not load.counts_LEK.any()
        seen.clear()
        load.counting = True
        model(**rows)
    real = rows["attention_mask"].flatten().bool()
    for layer, index_TK in enumerate(seen):
        expected = torch.bincount(index_TK[real].flatten(), minlength=4)
        assert load.counts_LEK[layer].sum(-1).tolist() == expected.tolist()
    shares = load.take()
    assert shares.shape == (2, 4)
    torch.testing.assert_close(shares.mean(1), torch.ones(2))
    assert not load.counts_LEK.any()


def test_gradient_norms_of_parts_make_up_the_whole(model):
    model.train()
    model(**batch()).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    whole = torch.stack([grad.square().sum() for grad in grads]).sum()
    groups = gradient_groups(model)
    assert set(groups) == {f"{part}_{third}" for part in ("attention", "experts") for third in ("early", "middle")}
    torch.testing.assert_close(sum(groups.values()), whole)
    callback = GradientCallback()
    args, state = SimpleNamespace(logging_first_step=True), SimpleNamespace(global_step=0, logging_steps=5)
    callback.on_pre_optimizer_step(args, state, None, model=model)
    logs = {"grad_norm": 2.0}
    callback.on_log(args, state, None, logs=logs)
    parts = [value for name, value in logs.items() if "/" in name]
    assert sum(value**2 for value in parts) ** 0.5 == pytest.approx(2.0)
    state.global_step = 1
    callback.on_pre_optimizer_step(args, state, None, model=model)
    assert not callback._groups, "a step that is not logged is not looked at"
    next(p for p in model.parameters() if p.requires_grad).grad = None
    assert gradient_groups(model) == {}


def test_a_sample_that_fails_ends_the_samples_only(tmp_path, model, capsys, monkeypatch):
    template = SimpleNamespace(stop_ids=[258], pad_id=257, parse=lambda ids: Reply("x"))
    said = []
    trackers = SimpleNamespace(text=lambda *values: said.append(values))
    shown = SimpleNamespace(sample=None)
    callback = SampleCallback(tmp_path, [], 2, template, trackers, shown)
    callback.prompts = [([5, 6], "question", "label")]
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False)
    state = SimpleNamespace(global_step=0, max_steps=5, is_world_process_zero=True)
    model.train()
    before = torch.get_rng_state()
    callback.on_train_begin(args, state, None, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert said == [("sample/1", "question\n\nx", 0)]
    assert shown.sample == ("question", "x")
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: 1 / 0)
    state.global_step = 5
    callback.on_evaluate(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    assert capsys.readouterr().out == "no more sample answers: division by zero\n"
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["base"], row["answer"]) for row in rows] == [(0, True, "x")]


def test_sample_answers_show_calls(tmp_path, tiny_gpt_oss, model, monkeypatch):
    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    called = (ToolCall("lamp", '{"on": true}'),)
    row = template.render(Conversation([Message("user", "Light!"), Message("assistant", tool_calls=called)]))
    rows = [TokenRow(*(np.array(values) for values in (row.input_ids, row.labels, row.loss_weights)))]
    said, shown = [], SimpleNamespace(sample=None)
    trackers = SimpleNamespace(text=lambda *values: said.append(values))
    callback = SampleCallback(tmp_path, rows, 1, template, trackers, shown)
    assert [(prompt, label) for _, prompt, label in callback.prompts] == [("Light!", 'lamp({"on": true})')]
    answer = template.tokenizer(" to=functions.lamp<|channel|>commentary <|constrain|>json<|message|>{}<|call|>")
    monkeypatch.setattr(callback, "_answer", lambda *_: answer["input_ids"])
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False)
    callback.on_train_begin(args, SimpleNamespace(global_step=0, is_world_process_zero=True), None, model=model)
    assert said == [("sample/1", "Light!\n\nlamp({})", 0)]
    assert shown.sample == ("Light!", "lamp({})")
    assert json.loads((tmp_path / "samples.jsonl").read_text())["answer"] == "lamp({})"


def test_a_run_has_all_of_it_and_trains_as_one_without(ossia, tiny_gpt_oss, rows, tmp_path):
    common = ("--model", tiny_gpt_oss, "--dataset", rows, "--split_dataset_ratio", 0.25, "--max_steps", 6)
    common += ("--logging_steps", 2, "--eval_steps", 3, "--learning_rate", 1e-2, "--lora_dropout", 0.1)
    common += ("--add_version", "false", "--save_strategy", "no", "--per_device_train_batch_size", 3)
    ossia.ok("sft", *common, "--output_dir", "with")
    ossia.ok("sft", *common, "--output_dir", "without", "--sample_prompts", 0, "--log_expert_load", "false")

    def read(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    full, bare = read("with"), read("without")
    assert [row["loss"] for row in full if "loss" in row] == [row["loss"] for row in bare if "loss" in row]
    last = {name: value for row in full for name, value in row.items()}
    assert {"loss/analysis", "loss/final", "weight_share/final", "eval_loss/final", "grad_norm/experts_early"} <= set(
        last
    )
    assert last["weight_share/analysis"] + last["weight_share/final"] == pytest.approx(1, abs=1e-4)
    counts = [row["trained_tokens"] for row in full if "trained_tokens" in row]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert 0 <= last["expert_load/drift"] <= 1
    assert last["expert_load/busiest"] >= 1
    assert not any(name.startswith("expert_load") for row in bare for name in row)
    assert sorted(path.name for path in (tmp_path / "without").glob("*.json*")) == ["metrics.jsonl", "run.json"]

    samples = [json.loads(line) for line in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["base"]) for row in samples] == [(0, True)] * 2 + [(3, False)] * 2 + [(6, False)] * 2
    assert all(row["prompt"].endswith("+1?") and row["label"].startswith("是") for row in samples)
    experts = json.loads((tmp_path / "with" / "experts.json").read_text())
    assert len(experts["load"]) == len(experts["base"]) == 2
    assert experts["step"] == 6
    page = (tmp_path / "with" / "report.html").read_text()
    assert samples[0]["label"] in page
    assert "change from the base" in page
