"""`ossia plan`: what a run of `ossia sft` with the same flags will need."""

from __future__ import annotations

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from ossia.adapters.files import base_model_of, check_adapter
from ossia.config import PlanConfig
from ossia.console import say
from ossia.errors import OssiaError, UsageError
from ossia.plan.advice import Change, try_plan, what_fits, what_is_faster
from ossia.plan.base import Base, find_base
from ossia.plan.here import Place, common, places, present
from ossia.plan.job import Job
from ossia.plan.rates import Rate, rate
from ossia.plan.show import show
from ossia.train.gpus import AMPERE, GPUS
from ossia.train.launch import nodes_wanted, processes_wanted
from ossia.train.pace import mean_tokens, sized
from ossia.train.plan import KINDS, PLANNED, Plan, Sizes, budget_of, leanest

_TOKENIZER = 30 * 10**6
_TOKEN = 9  # bytes of a prepared token


def run(config: PlanConfig) -> dict[str, Any]:
    """Print the plan, write `result_path`; returns what is written.

    Raises:
        UsageError: what `ossia sft` would refuse; a GPU that is unknown or too old; a model or data that is not here.
        OssiaError: it does not fit on a GPU that was named.
    """
    if config.result_path and not Path(config.result_path).parent.is_dir():
        raise UsageError(f"--result_path {config.result_path}: no such folder")
    where = places(config.gpu)
    base = _base(config)
    _check(config)
    job = _job(config, base)
    for line in config.notes(job.processes):
        say(line)
    if config.deepspeed and job.processes > 1:
        say(f"--deepspeed {config.deepspeed}: planned as without it, every process with the whole model")
    chosen = where or present()
    result = report(job, chosen or common())
    result["common"] = not chosen
    show(result)
    if config.result_path:
        Path(config.result_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    missing = [gpu["name"] for gpu in result["gpus"] if not gpu["fits"]]
    if where and missing:
        raise OssiaError(f"does not fit on {' and '.join(missing)}")
    return result


def report(job: Job, where: list[Place]) -> dict[str, Any]:
    """What is known of a run on each of these GPUs, as plain values; bytes and seconds."""
    config, rows, sizes = job.config, job.epoch, job.sizes()
    linear, expert_layers = job.targets
    epoch, steps = job.optimizer_steps()
    return {
        "model": job.base.name,
        "lora_rank": config.lora_rank,
        "linear_layers": len(linear),
        "expert_layers": len(expert_layers),
        "layers": sizes.layers,
        "trained_parameters": sizes.adapters,
        "batch": config.per_device_train_batch_size,
        "longest": job.longest,
        "accumulated": config.gradient_accumulation_steps,
        "processes": job.processes,
        "packing": config.packing,
        "step_tokens": job.steps.tokens,
        "margin": job.margin,
        "rows": None if job.lengths is None else len(job.lengths),
        "tokens_per_epoch": rows.tokens if rows else None,
        "padded_tokens_per_epoch": rows.padded if rows else None,
        "epochs": config.num_train_epochs,
        "optimizer_steps_per_epoch": epoch,
        "optimizer_steps": steps,
        "disk": _disk(job, epoch, steps),
        "gpus": [_on(job, place) for place in where],
    }


def _base(config: PlanConfig) -> Base:
    if config.adapters:
        from ossia.train.adapters import take_settings

        adapter = check_adapter(config.adapters[0])
        config.model = config.model or base_model_of(adapter)
        take_settings(config, adapter)
    if config.model is None:
        raise UsageError("give --model DIR (its config.json is enough), or openai/gpt-oss-20b")
    return find_base(config.model)


def _check(config: PlanConfig) -> None:
    """UsageError for runs whose memory nobody plans."""
    refused = {
        "device": config.device == "cpu",
        "torch_dtype": config.torch_dtype == "float32",
        "attn_impl": config.attn_impl not in PLANNED,
    }
    for name in (name for name, wrong in refused.items() if wrong):
        raise UsageError(
            f"--{name} {getattr(config, name)}: plans are made for gpt-oss in bfloat16 with flash attention on a GPU; "
            "leave the flag out"
        )


def _job(config: PlanConfig, base: Base) -> Job:
    processes = int(os.environ.get("WORLD_SIZE", processes_wanted() * nodes_wanted()))
    if not config.dataset:
        return Job(config, base, processes=processes)
    from ossia.plan.rows import MARGIN, planned_rows

    rows, held = planned_rows(config, base)
    margin = 1.0 if base.tokenizer else MARGIN
    return Job(config, base, rows.lengths, held.lengths if held else None, processes, margin)


def _on(job: Job, place: Place) -> dict[str, Any]:
    plan = try_plan(job, place)
    found = plan or leanest(sized(job.sizes(), job.steps, job.steps.longest), job.config.gradient_checkpointing)
    speed = _rate(place, job, found) if plan else None
    changes: list[Change] = what_is_faster(job, place, partial(_pace, place)) if plan else what_fits(job, place)
    return {
        "name": place.title,
        "free": place.free,
        "budget": budget_of(job.config, place.free),
        "fits": plan is not None,
        "peak": found.peak,
        "pass_tokens": found.sizes.tokens,
        "passes_per_step": sum(map(len, job.steps.passes(found.sizes.tokens))) / len(job.steps.drawn),
        "parts": found.parts._asdict(),
        "host": found.host,
        "recompute": {kind: found.recompute.count(kind) for kind in KINDS},
        "lines": [line.removeprefix("plan: ") for line in found.lines()[1:]],
        "host_layers": found.host_layers,
        "experts_at_once": found.experts_at_once,
        "slow": found.slow,
        "all_again": _peak_of(found.sizes, "layer"),
        "none_again": _peak_of(found.sizes, "none"),
        "grouped": bool(place.gpu and place.gpu.capability >= (9, 0)),
        "speed": _speed(job, speed) if speed else None,
        "no_speed": _no_speed(place, found) if plan and not speed else None,
        "changes": [
            {"flags": change.flags, "cost": change.cost, "peak": change.plan.peak, "options": change.options}
            for change in changes
        ],
        "larger": None if plan else _larger(job, place.free),
    }


def _rate(place: Place, job: Job, plan: Plan) -> Rate | None:
    if place.gpu is None:
        return None
    passes = job.steps.passes(plan.sizes.tokens)
    tokens = mean_tokens(passes) * len(passes) / sum(map(len, passes))
    return rate(plan, job.base.config, place.gpu, job.length, tokens=tokens)


def _pace(place: Place, job: Job, plan: Plan) -> float | None:
    """Seconds of an epoch; without data, of a token."""
    found = _rate(place, job, plan)
    if found is None:
        return None
    seconds, (epoch, _) = found.step_seconds(job.steps, job.length), job.optimizer_steps()
    return seconds / job.steps.tokens if epoch is None else epoch * seconds


def _speed(job: Job, found: Rate) -> dict[str, Any]:
    source, seconds = found.source, found.step_seconds(job.steps, job.length)
    epoch, steps = job.optimizer_steps()
    return {
        "tokens_per_second": round(job.processes * job.steps.tokens / seconds),
        "seconds_per_optimizer_step": seconds,
        "seconds_per_epoch": epoch * seconds if epoch else None,
        "seconds": steps * seconds if steps else None,
        "measured": found.measured,
        "source": {
            "device": source.device,
            "size": source.size,
            "case": source.case,
            "again": source.plan.recompute.count("layer"),
            "tokens_per_second": source.tokens_per_second,
            "commit": source.commit,
            "date": source.date,
        },
    }


def _no_speed(place: Place, plan: Plan) -> str:
    if place.gpu is None:
        return "no rate is known for this GPU"
    if not plan.sizes.fused:
        return "--lora_dropout takes steps that are not fused: slower, and not measured"
    return "no plan like this one was measured"


def _peak_of(sizes: Sizes, kind: str) -> int:
    """Where every layer is treated alike, and nothing else is done about memory."""
    return Plan(sizes, (kind,) * sizes.layers, 0).peak


def _larger(job: Job, free: int) -> str | None:
    """The smallest GPU that takes the run as it is."""
    known = sorted((gpu for gpu in GPUS if gpu.capability >= AMPERE and gpu.free > free), key=lambda gpu: gpu.free)
    return next((gpu.title for gpu in known if try_plan(job, Place(gpu.title, gpu.free, gpu))), None)


def _disk(job: Job, epoch: int | None, steps: int | None) -> dict[str, Any]:
    config, sizes = job.config, job.sizes()
    stored = {kind: job.stored(quantized=kind) for kind in (True, False)}
    checkpoint = 12 * sizes.adapters + _TOKENIZER
    saved = _saved(config, epoch, steps)
    rows = job.epoch
    needed = {
        "weights": 0 if job.base.weights else stored[job.base.quantized],
        "rows": rows.tokens * _TOKEN if rows else 0,
        "checkpoints": checkpoint * saved if saved is not None else None,
    }
    there = Path(config.output_dir).expanduser().absolute()
    while not there.exists():
        there = there.parent
    return {
        **needed,
        "checkpoint": checkpoint,
        "checkpoints_at_a_time": saved,
        "needed": sum(value or 0 for value in needed.values()),
        "free": shutil.disk_usage(there).free,
        "merged": {"mxfp4": stored[True], "bf16": stored[False]},
    }


def _saved(config: PlanConfig, epoch: int | None, steps: int | None) -> int | None:
    """Checkpoints on the disk at a time, the one being written among them; None where only data tells."""
    if config.save_strategy == "no":
        return 0
    between = epoch if config.save_strategy == "epoch" else config.save_steps
    made = math.ceil(steps / between) if steps and between else None
    if config.save_total_limit is None:
        return made
    # The best stays beside the newest ones, and a new one is written before an old one goes.
    held = config.save_total_limit + bool(config.val_dataset or config.split_dataset_ratio) + 1
    return held if made is None else min(made, held)
