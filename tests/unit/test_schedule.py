"""Learning rates step by step, against transformers' schedules."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.train.schedule import factor_of, optimizer_steps, schedule_lines, warmup_steps

PEAK = 1e-3
OPTIONS: dict[str, dict] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}
BY_LOSS = {"reduce_lr_on_plateau", "greedy"}
CURVES = sorted({kind.value for kind in SchedulerType} - BY_LOSS)
WARMING = sorted({*CURVES} - {"constant"})


def theirs(name, warmup, steps, options):
    """The rates of transformers' schedule over its optimizer steps, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    schedule = get_scheduler(name, optimizer, warmup, steps, options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        schedule.step()
    return rates


def ours(name, warmup, steps, options=None):
    factor = factor_of(name, PEAK, warmup, steps, OPTIONS.get(name, {}) if options is None else options)
    factor(steps)  # which a scheduler asks for after the last step
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("name", WARMING)
@pytest.mark.parametrize(("warmup", "steps"), [(1, 12), (2, 12), (5, 12), (11, 12)])
def test_warm_up_begins_at_one_nth_and_the_rest_is_transformers(name, warmup, steps):
    got, want = ours(name, warmup, steps), theirs(name, warmup, steps, OPTIONS.get(name, {}))
    assert got[0] == pytest.approx(1 / warmup)
    assert got[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert got[warmup:] == pytest.approx(want[warmup:])
    assert min(got) > 0


@pytest.mark.parametrize("name", CURVES)
def test_without_warm_up_it_is_transformers(name):
    assert ours(name, 0, 12) == pytest.approx(theirs(name, 0, 12, OPTIONS.get(name, {})))


@pytest.mark.parametrize("name", WARMING)
@pytest.mark.parametrize(("warmup", "steps"), [(1, 1), (4, 4), (100, 4)])
def test_a_run_that_is_all_warm_up(name, warmup, steps):
    assert ours(name, warmup, steps) == pytest.approx([(step + 1) / warmup for step in range(steps)])


@pytest.mark.parametrize("kind", ["linear", "cosine", "1-sqrt"])
def test_other_warm_ups_move_at_once_too(kind):
    options = {"num_decay_steps": 3, "warmup_type": kind}
    got, want = ours("warmup_stable_decay", 5, 12, options), theirs("warmup_stable_decay", 5, 12, options)
    assert got[:4] == pytest.approx(want[1:5])
    assert got[4:] == pytest.approx([1.0, *want[5:]])


def test_a_warm_up_that_begins_above_stays_as_it_is():
    options = {"num_decay_steps": 3, "min_lr_ratio": 0.4}
    assert ours("warmup_stable_decay", 5, 12, options) == pytest.approx(theirs("warmup_stable_decay", 5, 12, options))
    zero = {"min_lr_rate": 0.1, "warmup_lr_rate": 0.0}
    assert ours("cosine_warmup_with_min_lr", 5, 12, zero)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize(
    ("name", "warmup", "options", "message"),
    [
        ("cosine_warmup_with_min_lr", 1, {"min_lr": 0.0}, "step 12 of 12 would be 0"),
        ("warmup_stable_decay", 2, {"num_decay_steps": 2, "num_stable_steps": 3}, "step 8 of 12 and 4 more would be 0"),
        ("cosine", 0, {"num_cycles": 1.0}, "step 7 of 12 would be 0"),
        ("polynomial", 0, {"lr_end": -1e-3}, "step 7 of 12 and 5 more would be 0"),
        ("polynomial", 0, {"lr_end": 1.0}, r"lr_end \(1.0\) must be smaller"),
        ("cosine", 0, {"min_lr_rate": 0.1}, "unexpected keyword argument 'min_lr_rate'"),
        ("cosine_with_min_lr", 0, {}, "min_lr or min_lr_rate should be set"),
        ("warmup_stable_decay", 0, {}, "num_decay_steps"),
        ("constant", 0, {"num_cycles": 1}, "takes none"),
        ("constant_with_warmup", 0, {"num_cycles": 1}, "takes none"),
        ("reduce_lr_on_plateau", 0, {"nonsense": 1}, "nonsense"),
    ],
)
def test_rates_of_0_and_wrong_options_are_refused(name, warmup, options, message):
    with pytest.raises(UsageError, match=f"--lr_scheduler_type {name} with --lr_scheduler_kwargs .*{message}"):
        factor_of(name, PEAK, warmup, 12, options)


def test_schedules_that_go_by_loss_are_left_to_transformers():
    for name in BY_LOSS & {kind.value for kind in SchedulerType}:
        assert factor_of(name, PEAK, 3, 12, {}) is None


def lines(steps, **options):
    config = SftConfig(learning_rate=PEAK, **options)
    warmup, kind = warmup_steps(config, steps), config.lr_scheduler_type
    return schedule_lines(config, steps, factor_of(kind, PEAK, warmup, steps, config.lr_scheduler_kwargs))


def test_what_is_said():
    assert lines(20) == []
    assert lines(1) == []
    assert lines(4, warmup_steps=4) == []
    (line,) = lines(4, warmup_steps=100)
    assert line.startswith("warm-up: 100 steps, and the run has 4; its rate reaches 4.00e-05 of 1.00e-03")
    for kind in ("constant", "reduce_lr_on_plateau"):
        (line,) = lines(4, warmup_steps=2, lr_scheduler_type=kind)
        assert line == f"--warmup_steps 2: the schedule {kind} has no warm-up"
        assert lines(4, lr_scheduler_type=kind) == []


@pytest.mark.parametrize(
    ("options", "batches", "expected"),
    [
        ({}, 7, (7, 7)),
        ({"gradient_accumulation_steps": 16}, 7, (1, 1)),
        ({"gradient_accumulation_steps": 4, "num_train_epochs": 2.5}, 10, (3, 8)),
        ({"max_steps": 5}, 100, (100, 5)),
    ],
)
def test_optimizer_steps(options, batches, expected):
    assert optimizer_steps(SftConfig(**options), batches) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 1.0}, r"--warmup_ratio is 1.0; it must be in \[0, 1\)"),
        ({"warmup_ratio": math.nan}, "--warmup_ratio"),
        ({"warmup_steps": -1}, "--warmup_steps is -1"),
        ({"max_steps": 0}, "--max_steps 0 trains nothing"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        SftConfig(**options)
