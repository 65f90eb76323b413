"""The learning rate of each optimizer step: transformers' schedules, in whose warm-up the first step moves too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ossia.config import SftConfig
from ossia.errors import UsageError

Factor = Callable[[int], float]
"""By how much the peak rate is multiplied at an optimizer step, counted from 0."""

_OWN_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules that take no --lr_scheduler_kwargs; transformers would pass over them."""


def optimizer_steps(config: SftConfig, batches: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run, as Trainer counts them, for a process's batches in an epoch."""
    epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return epoch, config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch)


def factor_of(
    name: str, learning_rate: float, warmup: int, steps: int, options: Mapping[str, Any] | None
) -> Factor | None:
    """The factor of every step of a run; None for a schedule that goes by held-out loss.

    transformers' curves start their warm-up at 0, and that step would change nothing: a run of one step would end as it
    began. Here each of the n steps of warm-up has what transformers gives the one after it, so the first has 1/n and
    the last the peak; the rest is transformers' curve, unshifted, so that no step is added at its end either. A curve
    that starts at 1/n or above (cosine_warmup_with_min_lr) stays as it is.

    Args:
        name: transformers' name.
        learning_rate: the peak.
        warmup: steps of warm-up, n.
        steps: of the whole run.
        options: more for the schedule, as transformers knows them.

    Raises:
        UsageError: options that the schedule doesn't take, or a step of the run whose rate would be 0 or less.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    given = f"--lr_scheduler_type {name} with --lr_scheduler_kwargs '{json.dumps(dict(options or {}))}'"
    if options and name in _OWN_OPTIONS:
        raise UsageError(f"{given}: this schedule takes none")
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    try:
        theirs = get_scheduler(name, stand_in, warmup, steps, dict(options or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{given}: {' '.join(str(error).split())}") from error
    if not isinstance(theirs, LambdaLR):
        return None
    curve: Factor = theirs.lr_lambdas[0]
    late = warmup > 0 and curve(0) < 1 / warmup

    def factor(step: int) -> float:
        # A scheduler also asks for the step after the last, where some curves divide by 0.
        step = min(step, steps - 1)
        if not late or step >= warmup:
            return curve(step)
        return curve(step + 1) if step + 1 < warmup else 1.0

    _check_moves(given, factor, steps)
    return factor


def schedule_lines(config: SftConfig, steps: int, factor: Factor | None) -> list[str]:
    """What a user should know of the schedule before the run: a warm-up that is passed over, or never ends."""
    warmup = warmup_steps(config, steps)
    if config.warmup_steps and (factor is None or config.lr_scheduler_type == "constant"):
        return [f"--warmup_steps {config.warmup_steps}: the schedule {config.lr_scheduler_type} has no warm-up"]
    if factor is None or config.lr_scheduler_type == "constant" or warmup <= steps:
        return []
    reached = config.learning_rate * factor(steps - 1)
    return [
        f"warm-up: {warmup} steps, and the run has {steps}; its rate reaches {reached:.2e} of "
        f"{config.learning_rate:.2e} (lower --warmup_steps, or train longer)"
    ]


def warmup_steps(config: SftConfig, steps: int) -> int:
    """Steps of warm-up in a run."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * steps)


def _check_moves(given: str, factor: Factor, steps: int) -> None:
    still = [step for step in range(steps) if not factor(step) > 0]
    if still:
        more = f" and {len(still) - 1} more" if len(still) > 1 else ""
        raise UsageError(
            f"{given}: the learning rate of step {still[0] + 1} of {steps}{more} would be 0 and change nothing; give "
            "another schedule, or options whose rate stays above 0 (min_lr_rate, min_lr_ratio, lr_end)"
        )
