"""How long a pass takes on a GPU, and how large passes should be. Rough, for choosing: `ossia plan` goes by rates that
were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from ossia.config import SftConfig
from ossia.data.packing import bucket, pack
from ossia.errors import OssiaError
from ossia.train.gpus import Gpu
from ossia.train.gpus import named as gpu_named
from ossia.train.plan import Plan, Sizes, make_plan
from ossia.train.rate import flops_again, flops_per_token

HOST_LAYER, HOST_AGAIN = 6.9e-3, 2.8e-3
"""Seconds that the host needs to launch a layer's kernels in both directions, and once more where it is computed again:
however few the tokens, a pass takes no less. Beside an H100: 0.151 s of launches in a step of 0.168 to 0.183 s."""
_SHARE = 0.45
"""Assumed model FLOP utilisation: the share of a GPU's bfloat16 peak that passes reach."""
_BUS = 25e9
"""Bytes a second from host memory: a PCIe 4.0 slot. No measurement tells this apart."""
_SLOW = 2
"""Slowdown of plans that expand a few experts at a time, or that keep experts in host memory."""
_DRAWN = 64
"""Optimizer steps that are drawn to estimate with."""
_ALIKE = 1.01
"""Plans within this factor of the fastest are taken for equally fast."""
_GROWTH = 1.25
"""Factor from one tried size of a pass to the next."""


@dataclass(frozen=True)
class Steps:
    """What the optimizer steps of a process are made of.

    Args:
        drawn: tokens of each row of some steps.
        longest: tokens of the longest row there is.
        most: tokens of the fullest step that could come.
        held_longest: tokens of the longest held-out row; 0: there is none.
        held: tokens of all held-out rows.
    """

    drawn: tuple[tuple[int, ...], ...]
    longest: int
    most: int
    held_longest: int = 0
    held: int = 0

    @classmethod
    def of(cls, lengths: Any, rows: int, held: Any = None, seed: int = 0) -> Steps:
        """Steps of `rows` rows each, drawn from rows of `lengths` tokens, and held-out rows of `held` tokens."""
        import numpy as np

        known = np.asarray(lengths, np.int64)
        draw = np.random.default_rng(seed)
        size = min(rows, len(known))
        drawn = (draw.choice(known, size, replace=False) for _ in range(_DRAWN if len(known) > size else 1))
        most = int(np.partition(known, len(known) - size)[len(known) - size :].sum()) * rows // size
        beside = np.asarray([] if held is None else held, np.int64)
        found = tuple(tuple(int(length) for length in step) for step in drawn)
        return cls(found, int(known.max()), most, int(beside.max(initial=0)), int(beside.sum()))

    @classmethod
    def of_run(cls, config: SftConfig, lengths: Any, held: Any = None) -> Steps:
        """Steps of a run's options on rows of these lengths; with packing, on full sequences."""
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if config.packing:
            capacity = config.packing_length or config.max_length
            lengths = [capacity] * -(-int(sum(lengths)) // capacity)
        return cls.of(lengths, size, held, config.seed)

    @classmethod
    def alike(cls, length: int, rows: int) -> Steps:
        """Steps of `rows` rows that all have one length."""
        return cls(((length,) * rows,), length, length * rows)

    @cached_property
    def tokens(self) -> float:
        """Mean tokens of an optimizer step, without padding."""
        return sum(map(sum, self.drawn)) / len(self.drawn)

    @cached_property
    def length(self) -> float:
        """Token-weighted mean length of a row: the sum of squares over the sum."""
        rows = [length for step in self.drawn for length in step]
        return sum(length**2 for length in rows) / sum(rows)

    def passes(self, capacity: int) -> list[list[int]]:
        """Tokens, padding included, of each pass of the drawn steps, where a pass holds `capacity`."""
        return _passes(self.drawn, capacity)


@cache
def _passes(drawn: tuple[tuple[int, ...], ...], capacity: int) -> list[list[int]]:
    found = []
    for step in drawn:
        tokens, room = sum(step), max(capacity, *step)
        # Rows that are short beside a pass fill it.
        count = -(-tokens // room) if 8 * max(step) <= room or tokens <= room else len(pack(step, room))
        found.append([bucket(-(-tokens // count))] * count)
    return found


def plan_passes(
    sizes: Sizes, budget: int, steps: Steps, model: dict[str, Any], gpu: Gpu | None, checkpointing: str = "auto"
) -> Plan:
    """The plan of the passes that make steps fastest, of the smallest such; its `sizes.tokens` is what a pass holds.

    Args:
        sizes: of the model and the adapters; their tokens are set here.
        budget: bytes the run may take.
        steps: what is trained.
        model: gpt-oss's config.json.
        gpu: where; None: nobody knows, taken for an H100.
        checkpointing: as in `make_plan`.

    Raises:
        OssiaError: not even a pass of one row fits.
    """
    found: list[tuple[float, Plan]] = []
    for tokens in _capacities(steps):
        try:
            plan = make_plan(sized(sizes, steps, tokens), budget, checkpointing)
        except OssiaError:
            if not found:
                raise
            break
        found.append((step_seconds(plan, steps, model, gpu or gpu_named("H100")), plan))
    fastest = min(time for time, _ in found)
    return next(plan for time, plan in found if time <= _ALIKE * fastest)


def sized(sizes: Sizes, steps: Steps, tokens: int) -> Sizes:
    """Sizes with passes of so many tokens, for training and for held-out rows."""
    held = max(steps.held_longest, min(tokens, steps.held))
    return replace(sizes, tokens=tokens, eval_tokens=held, accumulates=tokens < steps.most)


def _capacities(steps: Steps) -> list[int]:
    """Tokens of a pass that are tried: from the longest row on to the fullest step."""
    found, tokens = {steps.longest, steps.most}, float(steps.longest)
    while tokens < steps.most:
        found.add(int(tokens))
        tokens *= _GROWTH
    # What holds a whole number of the longest rows wastes nothing where all are of one length.
    found |= {tokens // steps.longest * steps.longest for tokens in found}
    return sorted(found)


def step_seconds(plan: Plan, steps: Steps, model: dict[str, Any], gpu: Gpu) -> float:
    """Estimated seconds of an optimizer step, averaged over the drawn ones."""
    each, least = steps.passes(plan.sizes.tokens), host_seconds(plan)
    token, fixed = work(plan, model, steps.length) / (_SHARE * gpu.flops), moving(plan, gpu)
    seconds = sum(max(least, tokens * token + fixed) for step in each for tokens in step) / len(each)
    return _SLOW * seconds if plan.slow else seconds


def host_seconds(plan: Plan) -> float:
    """Lower bound in seconds of one pass: the time the host needs to launch its kernels."""
    return HOST_LAYER * plan.sizes.layers + HOST_AGAIN * plan.recompute.count("layer")


def work(plan: Plan, model: dict[str, Any], length: float) -> float:
    """FLOP per token."""
    return (flops_per_token(model, length) or 0.0) + flops_again(model, length, plan.recompute)


def moving(plan: Plan, gpu: Gpu) -> float:
    """Seconds of a pass that do not depend on its tokens: memory traffic of experts that are expanded (read, written,
    read again), of those that stay expanded (read twice), and of what comes from host memory."""
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


def mean_tokens(passes: Sequence[Sequence[int]]) -> float:
    """Mean tokens, padding included, of the passes of a step."""
    return sum(map(sum, passes)) / len(passes)
