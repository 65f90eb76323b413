"""Users' mistakes: one clear message, in under five seconds, exit code 1 or 2, no traceback, nothing left behind."""

from __future__ import annotations

import os
import shutil

import pytest

GOOD = '{"instruction": "q", "output": "a"}\n'


@pytest.fixture
def files(tmp_path, tiny_gpt_oss):
    """A folder of things that are wrong."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "key.jsonl").write_text('{"instructoin": "q", "output": "a"}\n')
    (tmp_path / "broken.jsonl").write_text(GOOD + '{"instruction": "q", \n')
    (tmp_path / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    shutil.copytree(tiny_gpt_oss, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copytree(tiny_gpt_oss, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:500])
    (tmp_path / "notamodel").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    return tmp_path


SFT = ("sft", "--model", "{model}", "--dataset")
CASES = {
    "no model": (("sft", "--dataset", "good.jsonl"), 2, "give --model"),
    "no data": (("sft", "--model", "{model}"), 2, "give --dataset"),
    "missing file": ((*SFT, "god.jsonl"), 2, "no such file; did you mean good.jsonl?"),
    "empty file": ((*SFT, "empty.jsonl"), 2, "empty.jsonl: the file is empty"),
    "blank file": ((*SFT, "blank.jsonl"), 2, "no rows in it"),
    "wrong key": ((*SFT, "key.jsonl"), 1, "key.jsonl:1: keys 'instructoin', 'output'"),
    "broken line": ((*SFT, "broken.jsonl"), 1, "broken.jsonl:2: broken JSON at character"),
    "no answer": ((*SFT, "silent.jsonl"), 1, "silent.jsonl:1: no answer in this row"),
    "short length": (
        (*SFT, "good.jsonl", "--max_length", "8"),
        1,
        "--max_length 8 is shorter than every row; the shortest has",
    ),
    "no weights": (("sft", "--model", "bare", "--dataset", "good.jsonl"), 1, "no weights (*.safetensors)"),
    "missing model": (("sft", "--model", "./nowhere", "--dataset", "good.jsonl"), 2, "no such folder"),
    "not a model": (("sft", "--model", "notamodel", "--dataset", "good.jsonl"), 2, "no config.json"),
    "unknown flag": ((*SFT, "good.jsonl", "--lora_rnk", "8"), 2, "did you mean '--lora_rank'"),
    "unknown size": ((*SFT, "good.jsonl", "--memory_budget", "much"), 2, "--memory_budget got 'much'; it takes a size"),
    "unknown recompute": ((*SFT, "good.jsonl", "--gradient_checkpointing", "some"), 2, "it takes one of: auto, true"),
    "unknown command": (("stf",), 2, "did you mean 'sft'"),
    "unknown tracker": ((*SFT, "good.jsonl", "--report_to", "swanlb"), 2, "swanlab"),
    "unknown loss": ((*SFT, "good.jsonl", "--loss_scale", "lastround"), 2, "last_round"),
    "unknown target": ((*SFT, "good.jsonl", "--target_modules", "q_prj"), 2, "did you mean 'q_proj'"),
    "unknown layer": ((*SFT, "good.jsonl", "--target_experts", "7"), 2, "this model's layers are 0 to 1"),
    "bad processes": ((*SFT, "good.jsonl"), 2, "NPROC_PER_NODE is 'two'"),
    "no adapter": (("infer", "--adapters", "nowhere"), 2, "--adapters nowhere: no such folder"),
    "not an adapter": (("infer", "--adapters", "bare"), 2, "no adapter_config.json"),
    "no question": (
        ("infer", "--model", "{model}", "--val_dataset", "good.jsonl"),
        2,
        "--val_dataset needs --result_path",
    ),
    "nothing to export": (("export", "--adapters", "bare"), 2, "give --merge_lora true"),
    "preview of nothing": (("data", "preview", "--model", "{model}", "--dataset", "god.jsonl"), 2, "no such file"),
    "resume from nothing": ((*SFT, "good.jsonl", "--resume_from_checkpoint", "bare"), 2, "no trainer_state.json"),
}


def _seconds_of_children():
    """On a processor: other tests may run beside."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("case", list(CASES))
def test_mistakes_are_explained(ossia, files, tiny_gpt_oss, case):
    argv, code, message = CASES[case]
    before = set(files.rglob("*"))
    started = _seconds_of_children()
    env = {"NPROC_PER_NODE": "two"} if case == "bad processes" else None
    done = ossia(*(word.format(model=tiny_gpt_oss) for word in argv), env=env)
    seconds = _seconds_of_children() - started
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("error: ")
    assert set(files.rglob("*")) == before, "something was left behind"
    assert seconds < 5


def test_cut_weights_are_named(ossia, files):
    done = ossia("sft", "--model", "cut", "--dataset", "good.jsonl")
    assert done.returncode == 1
    assert "damaged or cut short" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (files / "output").exists()


def test_unknown_schedule_is_refused_before_the_run_begins(ossia, files, tiny_gpt_oss):
    done = ossia("sft", "--model", tiny_gpt_oss, "--dataset", "good.jsonl", "--lr_scheduler_type", "cosin")
    assert done.returncode == 2
    assert "cosin is not a valid SchedulerType" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (files / "output").exists()


def test_debug_shows_the_traceback(ossia, files):
    assert "Traceback" in ossia("sft", "--model", "./nowhere", "--dataset", "good.jsonl", "--debug").stderr
