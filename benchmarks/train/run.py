"""Training speed and memory at gpt-oss-20b's size, beside its peers, in one run on one GPU.

python benchmarks/train/run.py --model FOLDER --out FILE.json [--cases NAME …] [--peers tutorial unsloth]
    [--bench 120b] [--kernels FOLDER] [--rows FILE.json] [--before COMMIT=SRC]

FOLDER is a checkpoint from checkpoint.py. Ossia's cases go through `ossia sft` on rows of exactly the length, every
token with loss; peers run their own scripts here (Unsloth wherever this Python finds it). Ossia's rates are medians of
its own log lines, of five steps each, peers' of single steps; the first step and the one or line after it are left out.
A case that fails stays in the table with its reason. Cases named "tutorial" take the rows of FILE.json (the tutorial's
alpaca_zh) as they are; their tokens are those of rows, padding not counted. `--before` runs each sft case also with the
package in SRC, an older commit's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
# batch, tokens of a row, steps, steps between log lines, flags
CASES: dict[str, tuple[int, int, int, int, list[str]]] = {
    "4x1024 all recomputed": (4, 1024, 50, 5, ["--gradient_checkpointing", "true", "--memory_budget", "17GB"]),
    "4x4096 all recomputed": (4, 4096, 30, 5, ["--gradient_checkpointing", "true", "--memory_budget", "20GB"]),
    "4x4096 in 76 GB": (4, 4096, 30, 5, ["--memory_budget", "76GB"]),
    "1x2048 in 13.8 GB": (1, 2048, 40, 5, ["--memory_budget", "13.8GB"]),
    "1x131072 in 76 GB": (1, 131072, 2, 1, ["--memory_budget", "76GB"]),
    "1x16384 one document": (1, 16384, 35, 5, ["--memory_budget", "76GB"]),
    "1x16384 packed": (1, 16384, 35, 5, ["--memory_budget", "76GB", "--packing", "true"]),
}
# rows of a batch, batches of a step, steps, steps between log lines, flags
TUTORIAL: dict[str, tuple[int, int, int, int, list[str]]] = {
    "tutorial 1x16": (1, 16, 60, 10, ["--memory_budget", "76GB"]),
    "tutorial 1x64": (1, 64, 30, 5, ["--memory_budget", "76GB"]),
    "tutorial 16x1": (16, 1, 60, 10, ["--memory_budget", "76GB"]),
    "tutorial 1x16 in 24 GB": (1, 16, 50, 10, ["--memory_budget", "24GB"]),
    "tutorial 1x16 in 16 GB": (1, 16, 40, 10, ["--memory_budget", "16GB"]),
    "tutorial evaluation": (1, 16, 3, 1, ["--memory_budget", "76GB", "--eval_steps", "1", "--sample_prompts", "0"]),
}
FOUR = "tutorial on four GPUs"
# The tutorial's flags as it has them, but for names.
WHOLE = """--deepspeed zero3 --train_type lora --torch_dtype bfloat16 --per_device_eval_batch_size 1
    --learning_rate 1e-4 --lora_alpha 32 --target_modules all-linear --warmup_ratio 0.05 --model_author a --model_name b
    --dataloader_num_workers 4 --use_liger_kernel true --load_from_cache_file false --loss_scale ignore_empty_think"""
TUTORIAL[FOUR] = (1, 16, 40, 5, shlex.split(WHOLE))
# In which processes take unlike numbers of passes.
TUTORIAL[f"{FOUR} in 24 GB"] = (1, 16, 30, 5, ["--deepspeed", "zero3", "--memory_budget", "24GB"])
BEFORE = {
    FOUR: (8, 2),
    "tutorial 1x16": (10, 2),
    "tutorial 1x64": (4, 1),
    "tutorial 1x16 in 24 GB": (8, 2),
    "tutorial evaluation": (1, 1),
}
"""Steps, and between log lines, of commits that take a pass a row."""
EVALUATED = 500
PACKED_ROW = 256  # tokens of a row in the packed case
PEERS: dict[str, list[tuple[int, int]]] = {
    "tutorial": [(4, 1024), (1, 4096)],
    "unsloth": [(4, 1024), (4, 4096)],
}


def rows(path: Path, tokens: int) -> None:
    """One plain text of at least so many tokens; `ossia sft` cuts it into rows of --max_length."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (f" {''.join(draw.choices(letters, k=3))}" for _ in range(tokens))
    path.write_text(json.dumps({"text": "".join(words)}) + "\n", encoding="utf-8")


class HostMemory(threading.Thread):
    """Watches a process's resident memory, in bytes: at `mark`, and its peak after it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(process.pid)
        self.before = self.peak = 0

    def mark(self) -> None:
        self.before = self.peak = self.process.memory_info().rss

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while self.process.is_running():
                self.peak = max(self.peak, self.process.memory_info().rss)
                time.sleep(0.05)


def sft(model: str, name: str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """One case through the command."""
    batch, length, steps, interval, flags = CASES[name]
    data = folder / f"{length}.jsonl"
    if not data.exists():
        rows(data, batch * length * (steps + 1))
    longest = length
    if "--packing" in flags:
        longest, flags = PACKED_ROW, [*flags, "--packing_length", str(length)]
    words = ["--dataset", data, "--max_length", longest, "--per_device_train_batch_size", batch, "--max_steps", steps,
             "--logging_steps", interval, *flags]  # fmt: skip
    result, logged = through_command(model, name, folder, env, words)
    result |= {"batch": batch, "length": length, "flags": flags}
    tokens = batch * length
    seconds = [round(tokens / entry["tokens_per_second"], 4) for entry in logged if "loss" in entry]
    return result if "failed" in result else {**result, **summary(seconds, tokens)}


def tutorial(model: str, name: str, folder: Path, env: dict[str, str], data: Path, before: bool) -> dict[str, Any]:
    """One of the tutorial's cases: rates of log lines, the first three left out; or of the last evaluation."""
    batch, times, steps, interval, flags = TUTORIAL[name]
    if before:
        steps, interval = BEFORE.get(name, (steps, interval))
        flags = flags[2:] if "--deepspeed" in flags else flags  # data-parallel: the faster way it had
    if name.startswith(FOUR):
        env = {**env, "NPROC_PER_NODE": "4"}
    words = ["--dataset", data, "--max_length", 8192, "--per_device_train_batch_size", batch, "--max_steps", steps,
             "--gradient_accumulation_steps", times, "--logging_steps", interval, *flags]  # fmt: skip
    if "evaluation" in name:
        held = folder / "held.json"
        held.write_text(json.dumps(json.loads(data.read_text(encoding="utf-8"))[:EVALUATED]), encoding="utf-8")
        words += ["--val_dataset", held, "--eval_on_start", "true"]
    result, logged = through_command(model, name, folder, env, words)
    result |= {"batch": batch, "accumulated": times, "flags": flags}
    if "failed" in result:
        return result
    if "evaluation" in name:
        seconds = [entry["eval_seconds"] for entry in logged if "eval_seconds" in entry]
        [held_tokens] = (
            int(line.split(" tokens,")[0].split(" ")[-1].replace(",", "")) for line in result.pop("data")[1:]
        )
        rates = [held_tokens / second for second in seconds[1:]] or [held_tokens / seconds[0]]
        return {**result, "tokens": held_tokens, **spread(rates), "seconds": seconds}
    lines = [entry["tokens_per_second"] for entry in logged if "loss" in entry]
    return {**result, **spread(lines[2:] if before else lines[3:]), "lines": lines}


def through_command(
    model: str, name: str, folder: Path, env: dict[str, str], words: list[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `ossia sft` said and took, and its log."""
    run = folder / name.replace(" ", "_")
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "ossia", "sft", "--model", model, *words, "--lora_rank", 8, "--save_strategy",
               "no", "--output_dir", run, "--add_version", "false"]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    host, output = HostMemory(process), []
    host.start()
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line.rstrip())
        if line.startswith("plan: ") and not host.before:
            host.mark()  # what comes next is the loading of the model
    process.wait()
    result: dict[str, Any] = {"program": "ossia sft", "case": name}
    result |= {"process_seconds": round(time.perf_counter() - started, 1)}
    result |= {"host_before_loading_bytes": host.before, "host_peak_bytes": host.peak}
    result["said"] = [line for line in output if line.startswith(("plan", "kernels", "memory", "loaded"))]
    result["data"] = [line for line in output if line.startswith(("training data", "held-out data"))]
    if process.returncode:
        return {**result, "failed": "\n".join(output)[-1500:]}, []
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result["peak_bytes"] = int(max(entry["memory_gb"] for entry in logged if "loss" in entry) * 1e9)
    return result, logged


def spread(rates: list[float]) -> dict[str, int]:
    """Median, slowest and fastest."""
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
    }


def summary(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Median rate and its spread, from seconds a step, the first two left out."""
    settled = seconds[2:] or seconds[-1:]
    rates = spread([tokens / second for second in settled])
    return {**rates, "first_step_seconds": seconds[0], "seconds": seconds}


def peer(name: str, model: str, batch: int, length: int, folder: Path) -> dict[str, Any]:
    """One case of a peer."""
    script = {"tutorial": "tutorial.py", "unsloth": "unsloth_step.py"}[name]
    where = [model] if name == "unsloth" else []
    command = [sys.executable, str(HERE / script), *where, str(batch), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    result: dict[str, Any] = {"program": name, "case": f"{batch}x{length}", "batch": batch, "length": length}
    if done.returncode:
        return {**result, "failed": done.stderr[-1500:]}
    values = json.loads(done.stdout.splitlines()[-1])
    return {**result, **summary(values.pop("seconds"), values.pop("tokens")), **values}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, help="folder where compiled kernels stay (default: one for this run)")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rows", type=Path, help="the tutorial's rows, for its cases")
    parser.add_argument("--before", metavar="COMMIT=SRC", help="an older commit's package, run beside")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--bench", nargs="*", default=[], help="sizes measured by `ossia bench` at 1 × 4,096")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        args.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1), encoding="utf-8")
        shown = {key: result.get(key) for key in ("tokens_per_second", "slowest", "fastest", "first_step_seconds")}
        peak = f"{result['peak_bytes'] / 1e9:.2f} GB" if result.get("peak_bytes") else "failed"
        print(result["program"], result["case"], shown, peak, result.get("said", ""), flush=True)
        if "failed" in result:
            print(result["failed"], flush=True)

    from ossia.bench.run import measured_on
    from ossia.model.load import pick_device

    environment = measured_on(pick_device("auto"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # The first case compiles every kernel anew; the others find them.
        kernels = args.kernels or folder / "triton"
        env = {**os.environ, "TRITON_CACHE_DIR": str(kernels), "OSSIA_CACHE": str(folder / "cache")}
        commit, _, source = (args.before or "").partition("=")
        for name in args.cases:
            for older in (True, False) if source else (False,):
                its = {**env, "PYTHONPATH": source} if older else env
                if name in TUTORIAL:
                    result = tutorial(args.model, name, folder, its, args.rows, older)
                else:
                    result = sft(args.model, name, folder, its)
                keep({**result, "program": "before", "commit": commit} if older else result)
        for name in args.peers:
            for batch, length in PEERS[name]:
                keep(peer(name, args.model, batch, length, folder))
        for size in args.bench:
            out = folder / f"{size}.json"
            command = [sys.executable, "-m", "ossia", "bench", "--size", size, "--per_device_train_batch_size", "1",
                       "--memory_budget", "74GB", "--max_steps", "6", "--result_path", str(out)]  # fmt: skip
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            said = [line for line in done.stdout.splitlines() if line.startswith("plan")]
            result = (
                json.loads(out.read_text(encoding="utf-8")) if not done.returncode else {"failed": done.stderr[-1500:]}
            )
            keep(
                {"program": "ossia bench", "case": f"{size} 1x4096", "batch": 1, "length": 4096, "said": said, **result}
            )


if __name__ == "__main__":
    main()
