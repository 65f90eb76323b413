"""SIGTERM and Ctrl-C: a checkpoint, exit code 0 or 130, the line that goes on; a second Ctrl-C leaves at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from ossia.track import read_metrics


def start(*args, cwd, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "ossia", *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def training(model, rows, tmp_path, **env):
    """A run without end that has logged a step and will save none by itself."""
    process = start(
        "sft", "--model", model, "--dataset", rows, "--max_steps", 100_000, "--logging_steps", 1, "--device", "cpu",
        "--save_steps", 100_000, cwd=tmp_path, **env,
    )  # fmt: skip
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("output/v0-*/metrics.jsonl")), process)
    return process


def test_sigterm_saves_and_the_line_that_is_printed_goes_on(tiny_gpt_oss, rows, tmp_path):
    process = training(tiny_gpt_oss, rows, tmp_path)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "Traceback" not in out + err
    run = next(tmp_path.glob("output/v0-*"))
    step = json.loads((run / "last" / "trainer_state.json").read_text())["global_step"]
    assert f"stopped at step {step} of 100000" in out
    line = next(line for line in out.splitlines() if "go on:" in line)
    assert line.endswith(f"sft --config {run / 'config.yaml'} --resume {run}")
    again = start(*line.split("ossia ")[-1].split(), cwd=tmp_path)
    wait_for(lambda: read_metrics(run / "metrics.jsonl")[-1]["step"] > step + 1, again)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert f"going on from {run / f'checkpoint-{step}'}" in out
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1)), "no step twice, none left out"
    assert (run / "last").resolve().name == f"checkpoint-{steps[-1]}"
    assert f"stopped at step {steps[-1]} of 100000 (Ctrl-C)" in out


def test_a_second_interrupt_leaves_at_once(tiny_gpt_oss, rows, tmp_path):
    process = training(tiny_gpt_oss, rows, tmp_path)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err


def test_two_processes_save_once_and_both_end(tiny_gpt_oss, rows, tmp_path):
    process = training(tiny_gpt_oss, rows, tmp_path, NPROC_PER_NODE="2")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert out.count("stopped at step") == 1
    files = {path.name for path in next(tmp_path.glob("output/v0-*/last")).iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_0.pth", "progress_1.pth", "manifest.json"} <= files
