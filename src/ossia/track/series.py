"""A metrics.jsonl as curves: read as it grows, and thinned for the eye."""

from __future__ import annotations

import json
import math
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 22


@dataclass
class Series:
    """One metric: rising steps, unix seconds and values of one length; NaN where the value was not finite."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, time: float, value: float) -> None:
        """A later value. Of a run that went on from an earlier checkpoint, what came after it there is forgotten."""
        while self.steps and self.steps[-1] >= step:
            for column in (self.steps, self.times, self.values):
                column.pop()
        self.steps.append(step)
        self.times.append(time)
        self.values.append(value)

    @property
    def last(self) -> float:
        """The newest finite value; NaN where there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


class MetricsReader:
    """The series of a metrics.jsonl. `update` reads on where it stopped, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.series: dict[str, Series] = {}
        self.step = 0
        self.first_time = self.last_time = math.nan
        self._offset = self._file = 0

    def update(self) -> bool:
        """Whether there was anything new. A file that became shorter, or took another's place (as where a run goes on
        from a checkpoint), is read anew; one that is gone is empty."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self._offset or (self._offset and found.st_ino != self._file):
                    self.__init__(self.path)  # type: ignore[misc]
                self._file = found.st_ino
                file.seek(self._offset)
                before = self._offset
                while piece := file.read(_PIECE):
                    end = piece.rfind(b"\n") + 1
                    if not end:
                        break
                    for line in piece[:end].splitlines():
                        self._add(line)
                    self._offset += end
                    file.seek(self._offset)
        except FileNotFoundError:
            return False
        return self._offset > before

    def _add(self, line: bytes) -> None:
        row = parse(line)
        if row is None:
            return
        step, time = row.pop("step"), row.pop("time", math.nan)
        self.step = int(step)
        self.last_time = time
        if math.isnan(self.first_time):
            self.first_time = time
        for name, value in row.items():
            if value is None or isinstance(value, int | float):
                series = self.series.get(name)
                if series is None:
                    series = self.series[name] = Series()
                series.add(step, time, math.nan if value is None else value)


def parse(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl; None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def thin(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Places of at most about `most` values that look as all do: of each stretch its lowest, its highest and its first
    NaN, and the two ends."""
    count = len(values)
    if count <= most:
        return np.arange(count)
    starts = np.linspace(0, count, max(most // 2, 1), endpoint=False).astype(np.int64)
    place = np.repeat(np.arange(len(starts)), np.diff([*starts, count]))
    missing = np.isnan(values)
    kept = [np.array([0, count - 1]), _first_of_each(missing, place)]
    for order in (1.0, -1.0):
        key = np.where(missing, np.inf, order * values)
        lowest = np.minimum.reduceat(key, starts)[place]
        kept.append(_first_of_each((key == lowest) & ~missing, place))
    return np.unique(np.concatenate(kept))


def _first_of_each(chosen: NDArray[np.bool_], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each stretch the first chosen value's place."""
    at = np.flatnonzero(chosen)
    return at[np.unique(place[at], return_index=True)[1]]


def points(
    series: Series, most: int, zero: float | None = None, window: tuple[float, float] | None = None
) -> dict[str, list[float | None]]:
    """A curve for a page: `x` and `y`, null where y is NaN.

    Args:
        series: the metric.
        most: points wanted, about.
        zero: unix seconds from which x counts seconds; None: x is the step.
        window: only x in between, and one more at each side.
    """
    x = np.array(series.steps) if zero is None else np.array(series.times) - zero
    y = np.array(series.values)
    if window is not None:
        part = slice(max(int(np.searchsorted(x, window[0])) - 1, 0), int(np.searchsorted(x, window[1], "right")) + 1)
        x, y = x[part], y[part]
    kept = thin(y, most)
    return {"x": [_short(v, 9) for v in x[kept]], "y": [_short(v, 6) for v in y[kept]]}


def _short(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() else number
