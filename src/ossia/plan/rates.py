"""How fast a planned run will be: from rates that were measured, scaled to the plan's work and to the GPU.

Seconds of a pass = work / (share of the GPU's bfloat16 peak) + experts expanded / bandwidth + weights in host memory /
bus, and no less than the host needs to launch it. The share is that of the measured case most like the plan.
`rates.json` is written by benchmarks/train/table.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ossia.config import PlanConfig
from ossia.plan.base import find_base
from ossia.plan.job import Job
from ossia.train.gpus import Gpu, of_device
from ossia.train.pace import Steps, host_seconds, moving, plan_passes, work
from ossia.train.plan import Plan, budget_of

RATES = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Measured:
    """One case of benchmarks/train/results.

    Args:
        size: of the model.
        case: its batch.
        device: the driver's name of the GPU.
        commit: of Ossia.
        date: of the measurement.
        tokens_per_second: median.
        gpu: what the device can do.
        plan: what the case did with memory.
        model: gpt-oss's config.json.
        length: tokens of a row.
    """

    size: str
    case: str
    device: str
    commit: str
    date: str
    tokens_per_second: int
    gpu: Gpu
    plan: Plan
    model: dict[str, Any]
    length: int

    @property
    def share(self) -> float:
        """Of the GPU's peak, in the seconds that are left for products."""
        tokens = self.plan.sizes.tokens
        left = tokens / self.tokens_per_second - moving(self.plan, self.gpu)
        return tokens * work(self.plan, self.model, self.length) / left / self.gpu.flops


@dataclass(frozen=True)
class Rate:
    """What a GPU will do with a plan.

    Args:
        source: the measured case it comes from.
        measured: whether that is this very case, on this GPU.
    """

    plan: Plan
    model: dict[str, Any]
    gpu: Gpu
    source: Measured
    measured: bool

    def seconds(self, tokens: float, length: float) -> float:
        """Of a pass, by its work.

        Args:
            tokens: of the pass, padding included.
            length: of a row, on average.
        """
        products = tokens * work(self.plan, self.model, length) / (self.source.share * self.gpu.flops)
        return products + moving(self.plan, self.gpu)

    def step_seconds(self, steps: Steps, length: float) -> float:
        """Of an optimizer step, on average; `length` is that of a row."""
        each, least = steps.passes(self.plan.sizes.tokens), host_seconds(self.plan)
        return sum(max(self.seconds(tokens, length), least) for step in each for tokens in step) / len(each)


def rate(
    plan: Plan,
    model: dict[str, Any],
    gpu: Gpu,
    length: float,
    cases: Sequence[Measured] | None = None,
    tokens: float | None = None,
) -> Rate | None:
    """How fast a plan will be; None for a GPU that isn't known, and for steps whose like was never measured.

    Args:
        plan: of the run.
        model: gpt-oss's config.json.
        gpu: where it trains.
        length: tokens of a row, on average.
        cases: what to go by; None: every case that comes with Ossia.
        tokens: of a pass, on average; None: as many as it holds.
    """
    known = [case for case in (measured() if cases is None else cases) if case.plan.slow == plan.slow]
    if not known or not gpu.tflops or not plan.sizes.fused:
        return None
    source = min(known, key=lambda case: _distance(case, plan, length, tokens or plan.sizes.tokens))
    full = tokens in (None, plan.sizes.tokens)
    same = full and replace(plan, budget=source.plan.budget) == source.plan and length == source.length
    return Rate(plan, model, gpu, source, same and source.gpu == gpu)


@cache
def measured() -> list[Measured]:
    """Every case that comes with Ossia."""
    return [_case(entry) for entry in json.loads(RATES.read_text(encoding="utf-8"))]


def _case(entry: dict[str, Any]) -> Measured:
    base = find_base(f"gpt-oss-{entry['size']}")
    config = PlanConfig.from_args(entry["flags"], "rates.json", "")
    gpu = of_device(entry["device"])
    assert gpu is not None, f"{entry['device']} is missing in ossia.train.gpus"
    job, budget = Job(config, base), budget_of(config, gpu.free)
    plan = plan_passes(job.sizes(), budget, job.steps, base.config, gpu, config.gradient_checkpointing)
    said = {key: entry[key] for key in ("size", "case", "device", "commit", "date", "tokens_per_second")}
    return Measured(**said, gpu=gpu, plan=plan, model=base.config, length=config.max_length)


def _distance(case: Measured, plan: Plan, length: float, tokens: float) -> float:
    """How unlike a case is: rows of each expert's products, length, how much is made again.

    From 512 rows to 2,048 the share of an H100's peak rose by a tenth; more than that are taken to be alike.
    """
    passes = ((case.plan, case.plan.sizes.tokens), (plan, tokens))
    rows = [min(count * p.sizes.top_k / p.sizes.experts, 2048) for p, count in passes]
    again = [p.recompute.count("layer") / p.sizes.layers for p in (case.plan, plan)]
    return abs(math.log(rows[0] / rows[1])) + abs(math.log(case.length / length)) / 4 + 2 * abs(again[0] - again[1])
