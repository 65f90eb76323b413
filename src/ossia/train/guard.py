"""Holds back an optimizer step whose loss or gradient is not sound.

The verdict is made on the device. On a CPU it is known at once. On a GPU a fused optimizer skips the update by itself
(`found_inf`, which torch's own gradient scaling uses), and the host reads the verdict one step later: it never waits.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ossia.data.store import TokenRow

EXPLODED = 3.0
"""A loss this many times over that of the first step, or of a uniform guess, has exploded."""


@dataclass(frozen=True)
class Step:
    """An optimizer step before its update. `wishes`: how many processes have each."""

    number: int
    rows: list[TokenRow]
    sound: bool
    loss: float
    norm: float
    wishes: list[float]


class Guard:
    """Watches the steps of a run.

    Args:
        device: where it trains.
        processes: that train together; all come to the same verdict.
        vocabulary: tokens there are.
        late: whether verdicts are read one step later.
    """

    def __init__(self, device: torch.device, processes: int, vocabulary: int, late: bool) -> None:
        self.processes = processes
        self.late = late
        self.limit: Tensor | None = None
        self.unsound = torch.zeros((), device=device)
        self._uniform = math.log(vocabulary)
        self._waiting: deque[tuple[int, list[TokenRow], Tensor, Any]] = deque()

    def watch(self, number: int, rows: list[TokenRow], loss: Tensor, norm: Tensor, wishes: list[float]) -> None:
        """Take a step. `unsound` is 1 from the first bad step on.

        Args:
            number: of the step, from 1.
            rows: of this process, that it was made of.
            loss: of this process; scalar, its mean over processes is the step's.
            norm: of the gradient; scalar.
            wishes: of this process, 0 or 1 each; one process alone knows its own.
        """
        loss, norm = loss.float(), norm.float().to(loss.device)
        bad = ~(loss.isfinite() & norm.isfinite())
        values = torch.stack([bad.float(), loss.nan_to_num() / self.processes])
        if self.processes > 1:
            values = torch.cat([values, torch.tensor(wishes, device=loss.device)])
            torch.distributed.all_reduce(values)
        if self.limit is None:
            self.limit = EXPLODED * values[1].clamp_min(self._uniform)
        self.unsound = torch.maximum(self.unsound, ((values[0] > 0) | (values[1] > self.limit)).float())
        mean = torch.where(values[0] > 0, loss, values[1])
        report, event = _to_host(torch.cat([torch.stack([self.unsound, mean, norm]), values[2:]]))
        self._waiting.append((number, rows, report, event))

    def known(self, wait: bool = False) -> list[Step]:
        """Steps whose verdict is there and was not given yet.

        Args:
            wait: for the last one too.
        """
        steps = []
        while len(self._waiting) > (1 if self.late and not wait else 0):
            number, rows, report, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            unsound, loss, norm, *wishes = report.tolist()
            steps.append(Step(number, rows, not unsound, loss, norm, wishes))
        return steps


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """A copy that arrives by the time of the event; None where it is there."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
