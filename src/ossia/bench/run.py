"""`ossia bench`: the training loop of `ossia sft`, on random weights and random tokens."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ossia.compat import quiet_libraries
from ossia.config import BenchConfig, SftConfig
from ossia.console import say
from ossia.errors import UsageError

if TYPE_CHECKING:
    from ossia.data.passes import Passes

_WARM = 2  # steps that compile and settle
_SHOWN = 40


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, print, and write `result_path`; returns what is written.

    Raises:
        UsageError: no GPU for a true size.
    """
    if config.result_path and not Path(config.result_path).parent.is_dir():
        raise UsageError(f"--result_path {config.result_path}: no such folder")
    import torch

    from ossia.adapters.inject import add_lora
    from ossia.bench.model import config_of, random_model
    from ossia.data.passes import Passes
    from ossia.model.load import pick_device, pick_dtype
    from ossia.train.pace import Steps
    from ossia.train.recompute import apply_plan
    from ossia.train.run import expandable_memory, plan_for, training_arguments

    expandable_memory()
    quiet_libraries()
    device = pick_device("auto")
    if config.size != "tiny" and device.type == "cpu":
        raise UsageError(f"--size {config.size} needs a CUDA GPU; --size tiny runs anywhere")
    sft = SftConfig(
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_length=config.max_length,
        lora_rank=config.lora_rank,
        gradient_checkpointing=config.gradient_checkpointing,
        memory_budget=config.memory_budget,
        max_steps=config.max_steps,
        save_strategy="no",
    )
    shape = config_of(config.size)
    layers = list(range(shape.num_hidden_layers))
    linear = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") for _ in layers]
    targets, dtype = (linear, layers), pick_dtype("auto", device)
    batch = config.per_device_train_batch_size
    steps = Steps.alike(config.max_length, batch)
    plan = plan_for(sft, shape.to_dict(), True, targets, steps, device, dtype)
    started = time.perf_counter()
    model = add_lora(random_model(shape, device, plan.offload() if plan else (), dtype=dtype), rank=config.lora_rank)
    say(f"random weights of gpt-oss-{config.size}: {time.perf_counter() - started:.1f} s")
    if plan is not None:
        apply_plan(model, plan)
    args = training_arguments(sft, False, dtype, device, plan)
    tokens = batch * config.max_length
    passes = Passes(0, plan.sizes.tokens if plan else tokens)
    seconds, kernels = _train(args, model, passes, shape.vocab_size, config.max_length, config.profile)
    rates = [tokens / second for second in seconds[_WARM:]]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    result = {
        **{key: value for key, value in config.to_dict().items() if key != "result_path"},
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "first_step_seconds": round(seconds[0], 2),
        "peak_bytes": peak,
        "planned_bytes": plan.peak if plan else None,
        "loss_chunk": plan.loss_chunk if plan else None,
        "kernels": kernels[:_SHOWN],
        "environment": measured_on(device),
    }
    for kernel in kernels[:_SHOWN]:
        say(f"  {kernel['milliseconds']:9.2f} ms  {kernel['calls']:>6} calls  {kernel['name'][:80]}")
    if kernels:
        busy = sum(kernel["milliseconds"] for kernel in kernels)
        say(f"  {busy:9.2f} ms  busy, of {1e3 * statistics.median(seconds[_WARM:]):.2f} ms a step")
    say(
        f"{batch} × {config.max_length:,} tokens: {result['tokens_per_second']:,} tokens/s ({result['slowest']:,} to "
        f"{result['fastest']:,}), first step {seconds[0]:.1f} s"
        + (f", {peak / 1e9:.1f} GB at the peak" if peak else "")
    )
    if config.result_path:
        Path(config.result_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _train(
    args: Any, model: Any, passes: Passes, vocabulary: int, length: int, profiled: bool
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds of each step; and where profiled the kernels of one more, the longest first."""
    import numpy as np
    from transformers import PrinterCallback, TrainerCallback

    from ossia.data.collate import Collator
    from ossia.data.store import TokenRow
    from ossia.train.trainer import SftTrainer

    steps, device = args.max_steps, args.device
    args.max_steps += profiled
    args.logging_strategy = "no"
    profiler = _profiler(device)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if len(self.seconds) == steps:
                profiler.start()
            self.began = _now(device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(_now(device) - self.began)
            if len(self.seconds) > steps:
                profiler.stop()
                return
            say(f"step {len(self.seconds)}/{steps}  {self.seconds[-1]:.3f} s")

    draw = np.random.default_rng(0)
    count = args.max_steps * args.per_device_train_batch_size
    ids = draw.integers(0, vocabulary, (count, length), dtype=np.int32)
    rows = [TokenRow(row, row, np.ones(length, np.float32)) for row in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = SftTrainer(
            model,
            base_model="",
            args=args,
            train_dataset=rows,
            data_collator=Collator(0),
            passes=passes,
            tokenizer=None,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds[:steps], _kernels(profiler, device) if profiled else []


def _profiler(device: Any) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])


def _kernels(profiler: Any, device: Any) -> list[dict[str, Any]]:
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        {"name": event.key, "calls": event.count, "milliseconds": round(getattr(event, time_of) / 1e3, 3)}
        for event in profiler.key_averages()
    ]
    return sorted(found, key=lambda kernel: -kernel["milliseconds"])


def _now(device: Any) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured_on(device: Any) -> dict[str, Any]:
    """Hardware, versions, date and Ossia's commit, for a benchmark's record."""
    from ossia.train.run import environment

    return {**environment(device), "commit": _commit(), "date": time.strftime("%Y-%m-%d")}


def _commit() -> str | None:
    """Of a checkout of Ossia; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
