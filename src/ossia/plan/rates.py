"""How fast a planned run will be: from rates that were measured, scaled to the plan's work and to the GPU.

Seconds of a batch = work / (share of the GPU's bfloat16 peak) + experts expanded / bandwidth + weights in host memory /
bus. The share is that of the measured case most like the plan. `rates.json` is written by benchmarks/train/table.py.
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
from ossia.train.plan import Plan, budget_of, make_plan
from ossia.train.rate import flops_again, flops_per_token

RATES = Path(__file__).with_name("rates.json")
_BUS = 25e9
"""Bytes a second from host memory: a PCIe 4.0 slot. No measurement tells this apart."""


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
        left = tokens / self.tokens_per_second - _moving(self.plan, self.gpu)
        return tokens * _work(self.plan, self.model, self.length) / left / self.gpu.flops


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
        """Of a batch.

        Args:
            tokens: of the batch, padding included.
            length: of a row, on average.
        """
        work = tokens * _work(self.plan, self.model, length)
        return work / (self.source.share * self.gpu.flops) + _moving(self.plan, self.gpu)


def rate(
    plan: Plan, model: dict[str, Any], gpu: Gpu, length: float, cases: Sequence[Measured] | None = None
) -> Rate | None:
    """How fast a plan will be; None for a GPU that isn't known, and for steps whose like was never measured.

    Args:
        plan: of the run.
        model: gpt-oss's config.json.
        gpu: where it trains.
        length: tokens of a row, on average.
        cases: what to go by; None: every case that comes with Ossia.
    """
    known = [case for case in (measured() if cases is None else cases) if case.plan.slow == plan.slow]
    if not known or not gpu.tflops or not plan.sizes.fused:
        return None
    source = min(known, key=lambda case: _distance(case, plan, length))
    same = replace(plan, budget=source.plan.budget) == source.plan and length == source.length
    return Rate(plan, model, gpu, source, same and source.gpu == gpu)


@cache
def measured() -> list[Measured]:
    """Every case that comes with Ossia."""
    return [_case(entry) for entry in json.loads(RATES.read_text(encoding="utf-8"))]


def least_tokens() -> int:
    """Tokens of the smallest batch that was measured at full speed. What the host costs each batch, which smaller ones
    would show, is not known."""
    return min((case.plan.sizes.tokens for case in measured() if not case.plan.slow), default=0)


def _case(entry: dict[str, Any]) -> Measured:
    base = find_base(f"gpt-oss-{entry['size']}")
    config = PlanConfig.from_args(entry["flags"], "rates.json", "")
    gpu = of_device(entry["device"])
    assert gpu is not None, f"{entry['device']} is missing in ossia.train.gpus"
    plan = make_plan(Job(config, base).sizes(), budget_of(config, gpu.free), config.gradient_checkpointing)
    said = {key: entry[key] for key in ("size", "case", "device", "commit", "date", "tokens_per_second")}
    return Measured(**said, gpu=gpu, plan=plan, model=base.config, length=config.max_length)


def _work(plan: Plan, model: dict[str, Any], length: float) -> float:
    """FLOP per token."""
    return (flops_per_token(model, length) or 0.0) + flops_again(model, length, plan.recompute)


def _moving(plan: Plan, gpu: Gpu) -> float:
    """Seconds of a batch that its tokens do not change: experts expanded (read, written, read again), those that stay
    expanded (read twice), and what is read from host memory."""
    s = plan.sizes
    gate_up, down = s.expanded(0)
    again = {"none": 0, "experts": gate_up, "layer": gate_up + down}
    written = sum(
        2 * (gate_up + down) + again[kind] - (gate_up if plan.reuse_expanded and kind != "none" else 0)
        for kind in plan.recompute[: s.layers - plan.held_layers]
    )
    stored = s.expert_weights * written / (gate_up + down)
    crossing = sum(3 if kind == "layer" else 2 for kind in plan.recompute[: plan.host_layers]) * s.expert_weights
    held = plan.held_layers * 2 * (gate_up + down)
    return (2 * written + stored + held) / (gpu.bandwidth * 1e9) + crossing / _BUS


def _distance(case: Measured, plan: Plan, length: float) -> float:
    """How unlike a case is: rows of each expert's products, length, how much is made again.

    From 512 rows to 2,048 the share of an H100's peak rose by a tenth; more than that are taken to be alike.
    """
    rows = [min(p.sizes.tokens * p.sizes.top_k / p.sizes.experts, 2048) for p in (case.plan, plan)]
    again = [p.recompute.count("layer") / p.sizes.layers for p in (case.plan, plan)]
    return abs(math.log(rows[0] / rows[1])) + abs(math.log(case.length / length)) / 4 + 2 * abs(again[0] - again[1])
