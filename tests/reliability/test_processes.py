"""Several processes train as one: the same losses, one folder, one set of lines; what cannot is said in a line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.track import read_metrics
from ossia.train.launch import nodes_wanted, processes_wanted
from ossia.train.run import run
from ossia.train.sharding import check_sharding, prefer_data_parallel

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
COMMON = ("--max_steps", 3, "--logging_steps", 1, "--save_steps", 2, "--learning_rate", 1e-2, "--device", "cpu")


@pytest.fixture
def alone(tiny_gpt_oss, rows, tmp_path):
    """Losses, gradient norms and learning rates of one process with all rows of a step."""
    flags = {"model": tiny_gpt_oss, "dataset": rows, "output_dir": tmp_path / "alone", "per_device_train_batch_size": 4}
    run(SftConfig.from_args([*map(str, COMMON), *(f"--{name}={value}" for name, value in flags.items())], "sft", ""))
    return numbers(tmp_path / "alone")


def numbers(folder):
    (run,) = folder.iterdir()
    names = ("loss", "grad_norm", "learning_rate")
    return [tuple(row[name] for name in names) for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def flat(rows):
    return [number for row in rows for number in row]


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_gives_the_losses_of_one_process_and_goes_on(ossia, alone, tiny_gpt_oss, rows, tmp_path, stage):
    words = ("sft", "--model", tiny_gpt_oss, "--dataset", rows, *COMMON, "--per_device_train_batch_size", 2)
    words += ("--deepspeed", stage, "--deepspeed_force", "true", "--output_dir", stage, "--resume", "auto")
    env = {"NPROC_PER_NODE": "2"}
    out = ossia.ok(*words, env=env)
    assert (out.count("run: "), out.count("step 3/3")) == (1, 1)
    assert flat(numbers(tmp_path / stage)) == pytest.approx(flat(alone), rel=1e-5)
    (run,) = (tmp_path / stage).iterdir()
    (run / "run.json").write_text('{"status": "running"}')
    (run / "checkpoint-3" / "manifest.json").unlink()
    assert "checkpoint-2 is used" in ossia.ok(*words, env=env)
    assert flat(numbers(tmp_path / stage)) == pytest.approx(flat(alone), rel=1e-5)


def test_zero_is_left_out_where_it_only_costs_time(ossia, alone, tiny_gpt_oss, rows, tmp_path):
    """Also where deepspeed is not installed; the processes take unlike numbers of passes."""
    words = ("sft", "--model", tiny_gpt_oss, "--dataset", rows, *COMMON, "--gradient_accumulation_steps", 2)
    # Held-out rows in five passes, of which one process has three.
    held = tmp_path / "held.jsonl"
    held.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    words += ("--val_dataset", held, "--eval_strategy", "epoch", "--eval_on_start", "true", "--deepspeed", "zero3")
    out = ossia.ok(*words, "--output_dir", "two", env={"NPROC_PER_NODE": "2"})
    assert out.count("--deepspeed zero3: left out, frozen weights are not its to shard") == 1
    assert flat(numbers(tmp_path / "two")) == pytest.approx(flat(alone), rel=1e-5)
    words = words[: words.index("--gradient_accumulation_steps")]
    flags = {
        "max_steps": 1,
        "eval_on_start": "true",
        "eval_strategy": "epoch",
        "val_dataset": held,
        "output_dir": tmp_path / "held",
    }
    run(SftConfig.from_args([*map(str, words[1:]), *(f"--{name}={value}" for name, value in flags.items())], "sft", ""))
    found = [
        next(row for row in read_metrics(next((tmp_path / name).iterdir()) / "metrics.jsonl") if "eval_loss" in row)
        for name in ("two", "held")
    ]
    for key in ("eval_loss", "eval_token_accuracy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)


def test_what_takes_the_place_of_zero():
    for stage in ("zero2", "zero3"):
        config = SftConfig(deepspeed=stage)
        assert "processes train data-parallel" in prefer_data_parallel(config, "gpt_oss")
        assert config.deepspeed is None
    for options, model in (({"deepspeed_force": True}, "gpt_oss"), ({}, "llama"), ({"deepspeed": "a.json"}, "gpt_oss")):
        config = SftConfig(**{"deepspeed": "zero2", **options})
        assert prefer_data_parallel(config, model) == ""
        assert config.deepspeed
    with pytest.raises(UsageError, match="give --deepspeed too"):
        SftConfig(deepspeed_force=True).validate()


def test_two_machines_are_one_run(alone, tiny_gpt_oss, rows, tmp_path):
    """Two launchers of one process each, as on two hosts."""
    words = ["sft", "--model", tiny_gpt_oss, "--dataset", rows, *COMMON, "--per_device_train_batch_size", 2]
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29567", "HF_HUB_OFFLINE": "1"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-m", "ossia", *map(str, words), "--output_dir", "two"],
            cwd=tmp_path,
            env={**os.environ, **shared, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert [text.count("step 3/3") for text in said] == [1, 0]
    assert "starting 1 processes on each of 2 machines" in said[0]
    assert flat(numbers(tmp_path / "two")) == pytest.approx(flat(alone), rel=1e-5)


def test_what_cannot_be_sharded_is_one_line(ossia, tiny_gpt_oss, rows, tmp_path, monkeypatch):
    words = ("sft", "--model", tiny_gpt_oss, "--dataset", rows, "--device", "cpu", "--fsdp", "full_shard")
    err = ossia.fails(2, *words, env={"NPROC_PER_NODE": "2"})
    assert len(err.splitlines()) == 1
    assert "--fsdp full_shard: gpt-oss's loss reads the output layer outside its forward" in err
    with pytest.raises(UsageError, match="accelerate shards by FSDP on GPUs only"):
        check_sharding(SftConfig(fsdp="full_shard", device="cpu"), "llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the package deepspeed is not installed"):
        check_sharding(SftConfig(deepspeed="zero3"), "gpt_oss")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(UsageError, match="not a JSON file that can be read"):
        check_sharding(SftConfig(deepspeed=str(tmp_path / "none.json")), "gpt_oss")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE is 'two'"),
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "NODE_RANK is 2; with NNODES=2"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, variables, message):
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        processes_wanted(), nodes_wanted()
