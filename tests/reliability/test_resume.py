"""A run that stops goes on as if it had not: the same numbers, and nothing good is ever lost."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from benchmarks.reliability.kill import measure

from ossia.config import SftConfig
from ossia.errors import OssiaError, UsageError
from ossia.track import read_metrics
from ossia.track.files import note
from ossia.train import callbacks, trainer
from ossia.train.checkpoint import checkpoints, damage
from ossia.train.guard import Guard
from ossia.train.run import run

NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "token_accuracy", "eval_loss", "train_loss")


@pytest.fixture
def config(tiny_gpt_oss, rows, tmp_path, monkeypatch):
    """A short run on a CPU, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSSIA_CACHE", str(tmp_path.parent / "cache"))
    return SftConfig(
        model=str(tiny_gpt_oss),
        dataset=[str(rows)],
        device="cpu",
        max_steps=8,
        logging_steps=3,
        save_steps=2,
        learning_rate=1e-2,
        lora_dropout=0.1,
    )


def changed(config, **options):
    return dataclasses.replace(config, **options)


def numbers(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: row[name] for name in NUMBERS if name in row} for row in rows]


def spoil(checkpoint):
    file = checkpoint / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_that_another_process_trains_is_left_alone(config, held_by_another):
    done = run(changed(config, output_dir="one", add_version=False, max_steps=4))
    held_by_another(done.run_dir)
    before = {path: path.read_bytes() for path in done.run_dir.rglob("*") if path.is_file()}
    again = changed(config, output_dir="one", add_version=False, max_steps=4)
    for other in ({}, {"resume": "auto"}, {"resume": "one"}, {"resume": "one/checkpoint-2"}):
        with pytest.raises(UsageError, match=r"one: process \d+ on .* trains there"):
            run(changed(again, **other))
    assert {path: path.read_bytes() for path in done.run_dir.rglob("*") if path.is_file()} == before


def test_killed_runs_equal_one_left_alone():
    done = measure(kills=2, steps=24, processes=1, seed=1)
    assert done["kills"] == 2


def test_killed_runs_of_two_processes_equal_one_left_alone():
    done = measure(kills=1, steps=12, processes=2, seed=2)
    assert done["kills"] == 1


def test_a_damaged_checkpoint_is_passed_over(config, tmp_path, capsys):
    whole = run(config).run_dir
    expected = numbers(whole)
    note(whole, status="running")
    for checkpoint in checkpoints(whole)[2:]:
        spoil(checkpoint)
    assert "optimizer.pt is not what was written" in damage(whole / "checkpoint-8")
    with pytest.raises(OssiaError, match=r"checkpoint-8 is damaged: optimizer.pt.*checkpoint-4 beside it is sound"):
        run(changed(config, resume=str(whole / "checkpoint-8")))
    assert run(changed(config, resume="auto")).run_dir == whole
    said = capsys.readouterr().out
    assert "checkpoint-6 is damaged: optimizer.pt is not what was written (checksum); checkpoint-4 is used" in said
    assert numbers(whole) == expected
    assert [path.name for path in checkpoints(whole)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert (whole / "damaged-checkpoint-8").is_dir()


def test_auto_starts_goes_on_and_ends(config, capsys):
    first = run(changed(config, resume="auto"))
    assert "--resume auto: no run of these options" in capsys.readouterr().out
    again = run(changed(config, resume="auto"))
    assert "is finished" in capsys.readouterr().out
    assert (again.run_dir, again.checkpoint) == (first.run_dir, first.checkpoint)
    assert run(changed(config, resume="auto", learning_rate=2e-2)).run_dir != first.run_dir


def test_what_cannot_go_on_is_said_before_a_model_loads(config, tmp_path, rows, monkeypatch):
    done = run(changed(config, max_steps=2)).run_dir
    monkeypatch.setattr("ossia.model.load.load_model", None)
    with pytest.raises(UsageError, match=r"that run has --learning_rate 0.01 \(here 0.02\)"):
        run(changed(config, max_steps=2, resume=str(done), learning_rate=2e-2))
    with pytest.raises(UsageError, match="neither a run folder nor a checkpoint"):
        run(changed(config, resume=str(tmp_path)))
    note(done, status="running")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"trained on other rows \(\[12\].*now \[11\]\)"):
        run(changed(config, dataset=[str(fewer)], resume_from_checkpoint=str(done / "checkpoint-2")))


class SmallFiles:
    """No file over 100 kB can be written while these steps are saved: the kernel refuses, as on a full disk."""

    def __init__(self, monkeypatch, *steps):
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        begin = trainer.SftTrainer._begin_part

        def limited(this, part, checkpoint):
            begin(this, part, checkpoint)
            full = this.state.global_step in steps
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else self.soft, self.hard))

        monkeypatch.setattr(trainer.SftTrainer, "_begin_part", limited)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))


def test_a_full_disk_pauses_saving_and_keeps_the_last_good_checkpoint(config, monkeypatch, capsys):
    expected = numbers(run(config).run_dir)
    with SmallFiles(monkeypatch, 4, 6):
        done = run(changed(config, save_total_limit=1, output_dir="full")).run_dir
    said = capsys.readouterr().out
    assert said.count("not saved: ") == 2
    assert "training goes on" in said
    assert "checkpoint-8 is saved; checkpoints are written again" in said
    assert [path.name for path in checkpoints(done)] == ["checkpoint-8"]
    assert numbers(done) == expected
    with SmallFiles(monkeypatch, 4, 6, 8), pytest.raises(OssiaError, match="last checkpoint is not saved"):
        run(changed(config, save_total_limit=1, output_dir="fuller"))
    (kept,) = Path("fuller").glob("v0-*/checkpoint-*")
    assert (kept.name, damage(kept)) == ("checkpoint-2", None)


def test_a_save_that_failed_is_tried_again_before_the_next_is_due(config, monkeypatch):
    monkeypatch.setattr(callbacks, "RETRY_S", 0.0)
    with SmallFiles(monkeypatch, 4):
        done = run(config).run_dir
    assert [path.name for path in checkpoints(done)] == [f"checkpoint-{step}" for step in (2, 5, 6, 8)]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e4])
def test_an_unsound_step_never_reaches_the_weights(config, monkeypatch, factor):
    real, calls, seen = trainer.sums_of, [], {}

    def sums_of(model, inputs, *rest):
        calls.append(inputs)
        seen["model"] = model
        sums = real(model, inputs, *rest)
        return sums if len(calls) < 5 else dataclasses.replace(sums, loss=sums.loss * factor)

    monkeypatch.setattr(trainer, "sums_of", sums_of)
    with pytest.raises(OssiaError, match=r"step 5: loss .*before the weights changed.*checkpoint-4 is safe; go on:"):
        run(config)
    (done,) = Path("output").iterdir()
    lines = [json.loads(line) for line in (done / "bad_batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [5]
    assert lines[0]["input_ids"] == calls[4]["input_ids"][0].tolist()
    assert "<|message|>" in lines[0]["text"]
    assert lines[0]["source"].endswith(f":{lines[0]['row'] + 1}"), lines[0]["source"]
    from ossia.adapters.files import read_weights
    from ossia.adapters.io import adapter_tensors

    saved, held = read_weights(done / "checkpoint-4"), adapter_tensors(seen["model"])
    assert all(torch.equal(saved[name], held[name]) for name in saved)
    last = read_metrics(done / "metrics.jsonl")[-1]
    assert (last["step"], last["loss"] is None) == (4, factor != 1e4)


def test_out_of_memory_leaves_the_last_checkpoint_and_says_what_to_change(config, monkeypatch):
    real, calls = trainer.sums_of, []

    def sums_of(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return real(*args)

    monkeypatch.setattr(trainer, "sums_of", sums_of)
    with pytest.raises(
        OssiaError, match=r"2.00 GiB.*Lower --per_device_train_batch_size.*checkpoint-4 is safe; go on:"
    ):
        run(config)
    monkeypatch.setattr(trainer, "sums_of", real)
    expected = numbers(run(changed(config, output_dir="whole")).run_dir)
    assert numbers(run(changed(config, resume="auto")).run_dir) == expected


def test_a_late_verdict_is_kept_by_the_optimizer_itself(device):
    """On a GPU the host reads the verdict a step later; a fused optimizer has skipped the update by then."""
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard, values = Guard(torch.device(device), 1, 100, late=True), []
    for number, loss in enumerate((1.0, 2.0, float("nan"), 1.0), start=1):
        weight.grad = torch.full((3,), loss, device=device)
        guard.watch(number, [], torch.tensor(loss, device=device), weight.grad.norm(), [])
        optimizer.found_inf = guard.unsound
        optimizer.step()
        values.append(weight.detach().clone())
    verdicts = guard.known(wait=True)
    assert [step.sound for step in verdicts] == [True, True, False, False]
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    assert torch.equal(values[1], values[3])
    assert [step.number for step in Guard(torch.device(device), 1, 100, late=True).known()] == []
