"""Ways a run ends before its last step, and what it leaves: early stopping, `--max_time`; the same numbers again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from ossia.config import SftConfig
from ossia.track import read_metrics
from ossia.track.files import facts_of
from ossia.train import callbacks
from ossia.train.checkpoint import checkpoints, damage
from ossia.train.deterministic import deterministic
from ossia.train.run import run


@pytest.fixture
def config(tiny_gpt_oss, rows, tmp_path, monkeypatch):
    """A run with held-out rows on a CPU, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return SftConfig(
        model=str(tiny_gpt_oss),
        dataset=[str(rows)],
        split_dataset_ratio=0.3,
        load_from_cache_file=False,
        device="cpu",
        max_steps=60,
        logging_steps=1,
        eval_steps=2,
        save_steps=50,
        learning_rate=1e-2,
        lora_dropout=0.1,
    )


def held_out(run):
    return {row["step"]: row["eval_loss"] for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row}


def losses(run):
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_metrics(run / "metrics.jsonl")]


def test_early_stopping_keeps_the_best_and_says_so(config, capsys):
    """A rate that overshoots soon: the held-out loss rises again."""
    done = run(
        dataclasses.replace(config, learning_rate=0.1, early_stopping_patience=2, save_total_limit=1, max_steps=200)
    ).run_dir
    losses = held_out(done)
    best = min(losses, key=losses.__getitem__)
    assert list(losses)[-1] == best + 4, "two evaluations after the best one"
    assert "stopped early: no lower held-out loss than" in capsys.readouterr().out
    assert (done / "best").resolve().name == f"checkpoint-{best}"
    assert (done / "last").resolve().name == f"checkpoint-{best + 4}"
    assert [(path.name, damage(path)) for path in checkpoints(done)] == [
        (f"checkpoint-{best}", None),
        (f"checkpoint-{best + 4}", None),
    ]


def test_patience_is_counted_across_an_interruption(config, monkeypatch):
    options = dataclasses.replace(config, learning_rate=0.1, early_stopping_patience=2, max_steps=200, save_steps=1)
    whole = run(dataclasses.replace(options, output_dir="whole")).run_dir
    last = list(held_out(whole))[-1]
    stop_after(monkeypatch, last - 1)
    first = run(options).run_dir
    monkeypatch.undo()
    assert list(held_out(first))[-1] == last - 2
    monkeypatch.chdir(first.parents[1])
    run(dataclasses.replace(options, resume=str(first)))
    assert losses(first) == losses(whole)


def stop_after(monkeypatch, step):
    """As if SIGTERM came within that step."""
    real = callbacks.StopCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            self._asked = callbacks.TERMINATE
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.StopCallback, "on_step_end", on_step_end)


def test_an_evaluation_that_a_stop_cuts_short_is_made_up_for(config, monkeypatch):
    config = dataclasses.replace(config, max_steps=6)
    whole = run(dataclasses.replace(config, output_dir="whole")).run_dir
    real, seen = callbacks.StopCallback.on_prediction_step, []

    def on_prediction_step(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if state.global_step == 4:
            self._asked = callbacks.TERMINATE
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.StopCallback, "on_prediction_step", on_prediction_step)
    first = run(config).run_dir
    assert list(held_out(first)) == [2]
    assert seen.count(4) == 1
    monkeypatch.setattr(callbacks.StopCallback, "on_prediction_step", real)
    run(dataclasses.replace(config, resume="auto"))
    assert losses(first) == losses(whole)
    assert (first / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    facts = facts_of(first)
    assert (facts["status"], facts["name"]) == ("finished", first.name)


def test_max_time_stops_saves_and_tells_how_to_go_on(config, capsys):
    done = run(
        dataclasses.replace(config, max_steps=100_000, eval_steps=50_000, save_steps=50_000, max_time="3s")
    ).run_dir
    said = capsys.readouterr().out
    (saved,) = checkpoints(done)
    step = int(saved.name.split("-")[1])
    assert f"stopped at step {step} of 100000 (--max_time). checkpoint-{step} is safe; go on:  " in said
    assert damage(saved) is None


def test_an_evaluation_leaves_training_as_it_is(config):
    """Dropout draws the same numbers whether the held-out rows were looked at or not."""
    often = run(dataclasses.replace(config, max_steps=6, eval_steps=1, output_dir="often")).run_dir
    never = run(dataclasses.replace(config, max_steps=6, eval_steps=50, output_dir="never")).run_dir
    pick = [[row for row in losses(done) if row[1] is not None] for done in (often, never)]
    assert pick[0] == pick[1]


def test_one_seed_gives_one_run_and_another_another(config):
    def numbers(name, seed):
        options = {"max_steps": 4, "deterministic": True, "seed": seed, "output_dir": name, "split_dataset_ratio": 0.0}
        return losses(run(dataclasses.replace(config, **options)).run_dir)

    first = numbers("a", 1)
    assert numbers("b", 1) == first
    assert numbers("c", 2) != first
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_not_deterministic_is_named_once(capsys):
    with deterministic():
        for _ in range(2):
            torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
    assert capsys.readouterr().out.count("--deterministic: put_ has no deterministic form here") == 1


def test_cublas_is_told_before_cuda_starts():
    script = "from ossia.train.deterministic import before_cuda; before_cuda(); import os, sys; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [":4096:8", "False"]
