"""Learning rates as they are applied: every step moves, logs say what was used, runs go on without losing a step."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from transformers.trainer_utils import SchedulerType

from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.track import read_metrics
from ossia.train.run import run

OPTIONS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"min_lr": 1e-6},
}
BY_LOSS = ("reduce_lr_on_plateau", "greedy")


@pytest.fixture
def config(tiny_gpt_oss, rows, tmp_path, monkeypatch):
    """A run of four steps on a CPU, three to an epoch, every step logged and saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSSIA_CACHE", str(tmp_path.parent / "cache"))
    return SftConfig(
        model=str(tiny_gpt_oss),
        dataset=[str(rows)],
        device="cpu",
        max_steps=4,
        per_device_train_batch_size=4,
        warmup_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=1,
        optim="adamw_torch",
    )


@pytest.fixture
def applied(monkeypatch):
    """What each update of the optimizer used: (rate, weight decay, beta 1) of its first group."""
    used = []
    update = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        group = self.param_groups[0]
        used.append((group["lr"], group["weight_decay"], group["betas"][0]))
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return used


def changed(config, **options):
    return dataclasses.replace(config, **options)


def logged(done):
    return [row["learning_rate"] for row in read_metrics(done.run_dir / "metrics.jsonl") if "loss" in row]


def adapter(done, step):
    return load_file(done.run_dir / f"checkpoint-{step}" / "adapter_model.safetensors")


def moved(done, steps):
    """Whether each of these steps changed the adapter of the one before."""
    both = [(adapter(done, step - 1), adapter(done, step)) for step in steps]
    return [any(not torch.equal(before[name], after[name]) for name in before) for before, after in both]


@pytest.mark.parametrize("name", sorted(kind.value for kind in SchedulerType))
def test_every_step_moves_and_the_log_has_the_rate_that_was_used(config, rows, applied, name):
    held_out = {"val_dataset": [str(rows)], "eval_steps": 1, "sample_prompts": 0} if name in BY_LOSS else {}
    done = run(changed(config, lr_scheduler_type=name, lr_scheduler_kwargs=OPTIONS.get(name, {}), **held_out))
    rates = [rate for rate, *_ in applied]
    assert len(rates) == 4
    assert min(rates) > 0
    assert logged(done) == pytest.approx(rates)
    assert moved(done, (2, 3, 4)) == [True] * 3
    if name not in (*BY_LOSS, "constant"):
        assert rates[:2] == pytest.approx([0.5e-2, 1e-2])


def test_a_run_of_one_step_moves(config, tmp_path, applied):
    seven = tmp_path / "seven.jsonl"
    text = tiny.rows(tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    seven.write_text("\n".join(text[:7]) + "\n", encoding="utf-8")
    options = {"max_steps": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "warmup_steps": 0}
    done = run(changed(config, dataset=[str(seven)], **options))
    assert [rate for rate, *_ in applied] == [1e-2]
    assert all(value.abs().max() > 0 for name, value in adapter(done, 1).items() if "lora_B" in name)


def test_a_warm_up_longer_than_the_run_is_said(config, capsys):
    run(changed(config, warmup_steps=50))
    assert "warm-up: 50 steps, and the run has 4; its rate reaches 8.00e-04 of 1.00e-02" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_goes_on_as_if_it_had_been_longer(config):
    """Bit for bit, where the schedule does not depend on the length; over the end of an epoch and in its middle."""
    config = changed(config, lr_scheduler_type="constant_with_warmup", lora_dropout=0.1)
    whole = run(changed(config, max_steps=8))
    for steps in (3, 4):
        first = run(changed(config, max_steps=steps))
        on = run(changed(config, max_steps=8, resume_from_checkpoint=str(first.checkpoint)))
        got, want = adapter(on, 8), adapter(whole, 8)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert logged(on) == logged(whole)[steps:]


@pytest.mark.slow
def test_a_finished_run_that_goes_on_loses_no_step(config, applied):
    """On a schedule that has come to its end, by --num_train_epochs."""
    config = changed(config, max_steps=-1)
    first = run(config)
    assert len(applied) == 3
    applied.clear()
    on = run(changed(config, num_train_epochs=3, resume_from_checkpoint=str(first.checkpoint)))
    rates = [rate for rate, *_ in applied]
    applied.clear()
    run(changed(config, num_train_epochs=3))
    assert rates == [rate for rate, *_ in applied][3:]
    assert len(rates) == 6
    assert min(rates) > 0
    assert logged(on) == pytest.approx(rates)
    assert moved(on, range(5, 10)) == [True] * 5
    start = load_file(first.checkpoint / "adapter_model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in adapter(on, 4).items())


def test_other_options_hold_from_the_first_step_on(config, applied):
    first = run(changed(config, weight_decay=0.1))
    applied.clear()
    options = {"max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.3, "adam_beta1": 0.8}
    run(changed(config, lr_scheduler_type="constant", **options, resume_from_checkpoint=str(first.checkpoint)))
    assert applied == [(1e-3, 0.3, 0.8)] * 4


def test_nothing_left_to_do_is_said_before_a_model_loads(config, monkeypatch):
    first = run(config)
    monkeypatch.setattr("ossia.model.load.load_model", None)
    for steps in (2, 4):
        with pytest.raises(UsageError, match=rf"has done 4 optimizer steps, and this run has {steps}; give more"):
            run(changed(config, max_steps=steps, resume_from_checkpoint=str(first.checkpoint)))


def test_a_step_without_a_rate_is_refused_before_a_model_loads(config, monkeypatch):
    monkeypatch.setattr("ossia.model.load.load_model", None)
    options = {"num_decay_steps": 1, "num_stable_steps": 0}
    with pytest.raises(UsageError, match="the learning rate of step 4 of 4 would be 0"):
        run(changed(config, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=options))


def test_a_schedule_of_deepspeed_is_refused(tmp_path):
    from ossia.train.sharding import sharding_arguments

    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}))
    with pytest.raises(UsageError, match="take out its entry 'scheduler'"):
        sharding_arguments(SftConfig(deepspeed=str(file)))
