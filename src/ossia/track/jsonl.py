"""`metrics.jsonl`: one JSON object a line for every log, the run's own record, always written."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from ossia.track.base import RunInfo, Status

METRICS = "metrics.jsonl"


class JsonlTracker:
    """Appends to `run_dir/metrics.jsonl`: `step`, `time` (unix seconds) and the numbers; NaN and infinity as null.

    Each line is flushed. A line half written by a killed run is cut off when the next one starts.
    """

    name = METRICS

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(self, run: RunInfo) -> None:
        path = run.run_dir / METRICS
        run.run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._file is None:
            raise RuntimeError("log() before start() or after finish()")
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for key, value in metrics.items():
            if key not in row and isinstance(value, int | float) and not isinstance(value, bool):
                row[key] = value if math.isfinite(value) else None
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def text(self, name: str, value: str, step: int) -> None:
        """Text isn't kept here: this file holds numbers."""

    def page(self, name: str, path: Path, step: int) -> None:
        """Nor are pages."""

    def finish(self, status: Status) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def _cut_torn_line(path: Path) -> None:
    """Shorten the file to the end of its last full line."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        file.truncate(end)
