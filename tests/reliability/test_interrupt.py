"""Ctrl-C: nothing half-written, exit code 130, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time


def start(*args, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "ossia", *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_training_stopped_half_way_keeps_metrics_and_checkpoints(tiny_gpt_oss, rows, tmp_path):
    process = start(
        "sft", "--model", tiny_gpt_oss, "--dataset", rows, "--max_steps", 100_000, "--logging_steps", 1,
        "--save_steps", 5, "--save_total_limit", 2, "--report_to", "none", cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("output/v0-*/last/trainer_state.json")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    run = next(tmp_path.glob("output/v0-*"))
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (run / "last" / "adapter_model.safetensors").is_file()


def test_an_interrupt_that_a_library_swallows_still_ends_training():
    import pytest

    from ossia.train.callbacks import InterruptCallback

    callback, before = InterruptCallback(), signal.getsignal(signal.SIGINT)
    callback.on_train_begin(None, None, None)
    callback.on_step_begin(None, None, None)
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not raised")
    with pytest.raises(KeyboardInterrupt):
        callback.on_step_begin(None, None, None)
    callback.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGINT) is before
