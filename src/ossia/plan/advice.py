"""What would make a run fit, or faster: each change tried by the planner."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ossia.console import counted
from ossia.errors import OssiaError
from ossia.plan.here import Place
from ossia.plan.job import Job
from ossia.train.pace import plan_passes
from ossia.train.plan import Plan, budget_of

_STEP = 256  # tokens that --max_length is lowered by
_WORTH = 1.1  # gain in speed that is worth a line


@dataclass(frozen=True)
class Change:
    """Options to change, and what becomes of the run.

    Args:
        options: by name.
        cost: what is given up, or gained, in words.
        plan: with them.
    """

    options: dict[str, Any]
    cost: str
    plan: Plan

    @property
    def flags(self) -> str:
        """To put behind the command."""
        return " ".join(f"--{name} {_value(value)}" for name, value in self.options.items())


def try_plan(job: Job, place: Place) -> Plan | None:
    """The plan of a run there; None where it does not fit."""
    budget, config = budget_of(job.config, place.free), job.config
    if budget > place.free:
        return None
    try:
        return plan_passes(job.sizes(), budget, job.steps, job.base.config, place.gpu, config.gradient_checkpointing)
    except OssiaError:
        return None


def what_fits(job: Job, place: Place) -> list[Change]:
    """Changes that each make a run fit, the cheapest first; where no single one does, several together.

    Of each kind the mildest that is enough. Empty: nothing helps.
    """
    found = [change for lever in _LEVERS if (change := _enough(job, place, lever))]
    return found or _together(job, place)


def what_is_faster(job: Job, place: Place, pace: Callable[[Job, Plan], float | None]) -> list[Change]:
    """Changes that take nothing from the result and save time: of each kind the best, the best of all first.

    Args:
        job: a run that fits.
        place: its GPU.
        pace: seconds of an epoch, or of a token; None where unknown.
    """
    plan = try_plan(job, place)
    before = pace(job, plan) if plan else None
    if not before:
        return []
    found = []
    for options, cost in _quicker(job):
        after = job.with_options(**options)
        changed = try_plan(after, place)
        seconds = pace(after, changed) if changed else None
        if changed and seconds and before / seconds > _WORTH:
            found.append((seconds, Change(options, f"about {before / seconds:.1f} times as fast{cost}", changed)))
    best: dict[frozenset[str], Change] = {}
    for _, change in sorted(found, key=lambda pair: pair[0]):
        best.setdefault(frozenset(change.options), change)
    return list(best.values())


Steps = Iterator[tuple[dict[str, Any], str]]
Lever = Callable[[Job, Place], Steps]
"""From a job and its GPU to changes of one kind, the mildest first, with what each costs."""


def _checkpointing(job: Job, place: Place) -> Steps:
    if job.config.gradient_checkpointing == "false":
        yield {"gradient_checkpointing": "auto"}, "slower, same result"


def _budget(job: Job, place: Place) -> Steps:
    if job.config.memory_budget:
        yield {"memory_budget": f"{int(place.free * 0.94 / 1e8) / 10}GB"}, "takes what is free"


def _experts(job: Job, place: Place) -> Steps:
    if job.config.experts == "dequantized" and job.base.quantized:
        yield {"experts": "auto"}, "experts stay in MXFP4, as they are stored"


def _packing(job: Job, place: Place) -> Steps:
    if job.config.packing and (job.config.packing_length or 0) > job.config.max_length:
        yield {"packing_length": job.config.max_length}, "shorter packed sequences"


def _dropout(job: Job, place: Place) -> Steps:
    if job.config.lora_dropout and job.targets[1]:
        yield {"lora_dropout": 0.0}, "no dropout, and the fused path: faster"


def _rank(job: Job, place: Place) -> Steps:
    for rank in _halved(job.config.lora_rank):
        yield {"lora_rank": rank}, "smaller adapters"


def _length(job: Job, place: Place) -> Steps:
    packed = job.config.packing and job.config.packing_length
    for length in range((job.longest - 1) // _STEP * _STEP, 0, -_STEP):
        options = {"max_length": length, **({"packing_length": length} if packed else {})}
        shorter = job.with_options(**options)
        if job.lengths is None:
            yield options, "longer rows are left out"
        elif shorter.left_out < len(job.lengths):
            what = "cut" if job.config.truncation in ("left", "right") else "left out"
            yield options, f"{counted(shorter.left_out, 'row')} ({shorter.left_out / len(job.lengths):.1%}) {what}"


def _no_experts(job: Job, place: Place) -> Steps:
    if job.targets[1] and job.targets[0]:
        yield {"target_experts": "none"}, "only attention is trained"


_LEVERS: tuple[Lever, ...] = (
    _budget,
    _checkpointing,
    _experts,
    _packing,
    _dropout,
    _rank,
    _length,
    _no_experts,
)
"""The cheapest first: what costs time alone, then what changes the result a little, then what is lost."""


def _enough(job: Job, place: Place, lever: Lever) -> Change | None:
    """The mildest step of a lever that fits."""
    steps = list(lever(job, place))
    plans: list[Plan | None] = [None] * len(steps)

    def fits(number: int) -> bool:
        plans[number] = try_plan(job.with_options(**steps[number][0]), place)
        return plans[number] is not None

    mildest = bisect_left(range(len(steps)), True, key=fits)
    if mildest == len(steps):
        return None
    plan = plans[mildest]
    assert plan is not None, "the bisection ends at a step that it tried"
    return Change(*steps[mildest], plan)


def _together(job: Job, place: Place) -> list[Change]:
    """Levers one after another, each as far as it goes, until the last one fits; then those that weren't needed go."""
    given: dict[str, Any] = {}
    costs: list[tuple[set[str], str]] = []
    for lever in _LEVERS:
        now = job.with_options(**given)
        if change := _enough(now, place, lever):
            given |= change.options
            costs.append((set(change.options), change.cost))
            break
        steps = list(lever(now, place))
        if steps:
            given |= steps[-1][0]
            costs.append((set(steps[-1][0]), steps[-1][1]))
    for names, cost in reversed(list(costs)):
        fewer = {name: value for name, value in given.items() if name not in names}
        if fewer and try_plan(job.with_options(**fewer), place):
            given = fewer
            costs.remove((names, cost))
    plan = try_plan(job.with_options(**given), place) if given else None
    return [Change(given, "; ".join(cost for _, cost in costs), plan)] if plan else []


def _quicker(job: Job) -> Steps:
    config = job.config
    if config.gradient_checkpointing != "auto":
        yield {"gradient_checkpointing": "auto"}, ""
    if config.lora_dropout and job.targets[1]:
        yield {"lora_dropout": 0.0}, "; no dropout"
    if not config.packing and job.lengths is not None:
        yield {"packing": True}, "; more rows in an optimizer step"


def _halved(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
