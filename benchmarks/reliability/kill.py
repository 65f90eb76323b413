"""Kill a run with SIGKILL at random moments, resume it, and hold it against one that was left alone.

python benchmarks/reliability/kill.py [--kills 50] [--steps 120] [--processes 1] [--result_path FILE.json]

A tiny random gpt-oss with dropout, evaluation and a checkpoint at every second step trains on a CPU; `--resume auto`
goes on after every kill. Losses, gradient norms and held-out losses must be the same numbers, each step once, and the
adapter at the end the same tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

TIMED = ("time", "tokens_per_second", "memory_gb", "train_seconds", "eval_seconds")


def command(work: Path, name: str, steps: int) -> list[str]:
    flags = {
        "model": work / "model",
        "dataset": work / "rows.jsonl",
        "split_dataset_ratio": 0.2,
        "max_steps": steps,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "logging_steps": 3,
        "eval_steps": 7,
        "save_steps": 2,
        "save_total_limit": 3,
        "device": "cpu",
        "output_dir": work / name,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "ossia", "sft", *words, "--resume", "auto"]


def environment(work: Path, processes: int) -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "src")))
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OSSIA_CACHE": str(work / "cache")}
    return {**os.environ, **fixed, "NPROC_PER_NODE": str(processes)}


def run_of(work: Path, name: str) -> Path:
    """The only run there is: a killed one goes on in its folder."""
    (run,) = (work / name).glob("v*-*")
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def kill_once(work: Path, name: str, steps: int, processes: int, delay: float, in_save: float | None) -> str:
    """Start or resume the run and kill it `delay` seconds into training, or `in_save` seconds into the next save after
    that; where it was struck."""
    process = subprocess.Popen(
        command(work, name, steps),
        env=environment(work, processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("run: "):
            break
    else:
        if process.wait() or "is finished" not in said:
            raise SystemExit(said)
        return "finished"
    time.sleep(delay)
    while in_save is not None and process.poll() is None:
        if list(run_of(work, name).glob(".checkpoint-*.part")):
            time.sleep(in_save)
            break
    family = children_of(process.pid)
    finished = process.poll() is not None
    for pid in [process.pid, *family]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    if finished:
        return "finished"
    return "saving" if list(run_of(work, name).glob(".checkpoint-*")) else "training"


def children_of(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def finish(work: Path, name: str, steps: int, processes: int) -> float:
    began = time.monotonic()
    done = subprocess.run(command(work, name, steps), env=environment(work, processes), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.monotonic() - began


def measure(kills: int, steps: int, processes: int, seed: int) -> dict[str, Any]:
    """Kill runs until there were `kills`; every run, once finished, must equal the one left alone."""
    from tests import tiny

    draw = random.Random(seed)
    struck: dict[str, int] = {"training": 0, "saving": 0}
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny.gpt_oss(work / "model")
        tiny.rows(work / "rows.jsonl", 40)
        seconds = finish(work, "alone", steps, processes)
        alone = run_of(work, "alone")
        training = json.loads((alone / "metrics.jsonl").read_text().splitlines()[-1])["train_seconds"]
        while sum(struck.values()) < kills:
            runs += 1
            name = f"killed-{runs}"
            for _ in range(10):
                in_save = draw.uniform(0, 0.02) if draw.random() < 0.4 else None
                where = kill_once(work, name, steps, processes, draw.uniform(0, training / 5), in_save)
                if where == "finished":
                    break
                struck[where] += 1
                if sum(struck.values()) == kills:
                    break
            finish(work, name, steps, processes)
            check(alone, run_of(work, name), steps)
    return {
        "kills": sum(struck.values()),
        "struck_while": struck,
        "runs": runs,
        "processes": processes,
        "steps": steps,
        "seed": seed,
        "same_losses": True,
        "same_adapter": True,
        "seconds_alone": round(seconds, 1),
    }


def check(alone: Path, killed: Path, steps: int) -> None:
    """SystemExit where the two differ in a single bit."""
    wanted, found = rows_of(alone), rows_of(killed)
    if wanted != found:
        pair = next(((a, b) for a, b in zip(wanted, found, strict=False) if a != b), (len(wanted), len(found)))
        raise SystemExit(f"metrics differ: alone {pair[0]}, killed {pair[1]}")
    ends = [load_file(run / f"checkpoint-{steps}" / "adapter_model.safetensors") for run in (alone, killed)]
    if differing := [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]:
        raise SystemExit(f"the adapters differ, first in {differing[0]}")
    if hidden := list(killed.glob(".checkpoint-*")):
        raise SystemExit(f"left behind: {hidden}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result_path", type=Path)
    options = parser.parse_args()
    result = measure(options.kills, options.steps, options.processes, options.seed)
    from ossia.bench.run import measured_on

    text = json.dumps({**result, **measured_on(torch.device("cpu"))}, indent=2)
    print(text)
    if options.result_path:
        options.result_path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
