"""The runs under a folder: found, summed up from the ends of their files, read further as they grow."""

from __future__ import annotations

import csv
import io
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ossia.track.jsonl import METRICS
from ossia.track.lock import holder
from ossia.track.report import REPORT
from ossia.track.series import MetricsReader, parse, points

CONFIG = "config.yaml"
SHOWN_OPTIONS = ("model", "dataset", "learning_rate", "lora_rank", "target_experts")
_DEEP = 5
_TAIL = 16_384
_LIVE_S = 120.0
_READERS = 128
_SKIPPED = ("checkpoint-", ".", "swanlog")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class _Entry:
    """What is known of a run, and of which state of its files."""

    stamp: tuple[int, int] = (-1, -1)
    version: int = 0
    live: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    options_stamp: int = -1
    options: dict[str, Any] = field(default_factory=dict)


class Runs:
    """Runs by their folder's path under `root`. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, _Entry] = {}
        self._readers: OrderedDict[str, MetricsReader] = OrderedDict()
        self._version = 0
        self._lock = threading.RLock()

    def changes(self, since: int = 0) -> dict[str, Any]:
        """Runs that are new or changed after a `version`, ids of all there are, and the version now."""
        with self._lock:
            found = dict(self._find())
            for gone in self._entries.keys() - found.keys():
                del self._entries[gone]
                self._readers.pop(gone, None)
            self._version += 1
            for name, stat in found.items():
                entry = self._entries.setdefault(name, _Entry())
                stamp = (stat.st_size, stat.st_mtime_ns)
                if stamp != entry.stamp or self._lives(name, entry.row, stat.st_mtime) != entry.live:
                    self._sum_up(name, entry, stamp)
                    entry.version = self._version
            rows = [{"id": name, **one.row} for name, one in self._entries.items() if one.version > since]
            return {"version": self._version, "runs": rows, "ids": sorted(self._entries)}

    def options(self, name: str) -> dict[str, Any]:
        """A run's resolved options; empty where they cannot be read. KeyError: no such run."""
        with self._lock:
            return self._options(name, self._entries[name])

    def curves(
        self,
        names: Sequence[str],
        metrics: Sequence[str],
        most: int,
        by_time: bool = False,
        window: tuple[float, float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """For each run and metric `points`, x the step or seconds since the run's first line. KeyError: no such run."""
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            with self._lock:
                reader = self._read(name)
                zero = reader.first_time if by_time else None
                known = [metric for metric in metrics if metric in reader.series]
                found[name] = {metric: points(reader.series[metric], most, zero, window) for metric in known}
        return found

    def metrics(self, name: str) -> list[str]:
        """What a run has logged. KeyError: no such run."""
        with self._lock:
            return list(self._read(name).series)

    def csv(self, names: Sequence[str], metrics: Sequence[str]) -> str:
        """All values: `run,step,time` and the metrics; empty where there is none. KeyError: no such run."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", "step", "time", *metrics])
        for name in names:
            rows: dict[tuple[float, float], dict[str, float]] = {}
            with self._lock:
                series = self._read(name).series
                for metric in metrics:
                    if one := series.get(metric):
                        for step, when, value in zip(one.steps, one.times, one.values, strict=True):
                            if math.isfinite(value):
                                rows.setdefault((step, when), {})[metric] = value
            for (step, when), values in sorted(rows.items()):
                writer.writerow([name, int(step), when, *(values.get(metric, "") for metric in metrics)])
        return text.getvalue()

    def _read(self, name: str) -> MetricsReader:
        """A run's metrics, read up to now."""
        _ = self._entries[name]
        reader = self._readers.pop(name, None) or MetricsReader(self.root / name / METRICS)
        self._readers[name] = reader
        while len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        reader.update()
        return reader

    def report(self, name: str) -> Path:
        """The file of a run's report. KeyError: no such run, or none of it."""
        file = self.root / name / REPORT
        if name not in self._entries or not file.is_file():
            raise KeyError(name)
        return file

    def _find(self) -> Iterator[tuple[str, os.stat_result]]:
        pending = [("", 0)]
        while pending:
            place, depth = pending.pop()
            try:
                with os.scandir(self.root / place) as entries:
                    for entry in entries:
                        if entry.name == METRICS and entry.is_file():
                            yield place or ".", entry.stat()
                        elif (
                            depth < _DEEP
                            and entry.is_dir(follow_symlinks=False)
                            and not entry.name.startswith(_SKIPPED)
                        ):
                            pending.append((f"{place}/{entry.name}".lstrip("/"), depth + 1))
            except OSError:
                continue

    def _sum_up(self, name: str, entry: _Entry, stamp: tuple[int, int]) -> None:
        """Fill the row from the last lines of the file."""
        last: dict[str, Any] = {}
        with (self.root / name / METRICS).open("rb") as file:
            file.seek(max(0, stamp[0] - _TAIL))
            lines = file.read(_TAIL).splitlines()
        for line in reversed(lines):
            for key, value in (parse(line) or {}).items():
                last.setdefault(key, value)
        entry.stamp = stamp
        entry.live = self._lives(name, last, stamp[1] / 1e9)
        options = self._options(name, entry)
        entry.row = {
            "name": Path(name).name if name != "." else self.root.name,
            "modified": round(stamp[1] / 1e9, 1),
            "live": entry.live,
            "report": (self.root / name / REPORT).is_file(),
            "last": last,
            "options": {key: options[key] for key in SHOWN_OPTIONS if key in options},
        }

    def _options(self, name: str, entry: _Entry) -> dict[str, Any]:
        file = self.root / name / CONFIG
        try:
            stamp = file.stat().st_mtime_ns
            if stamp != entry.options_stamp:
                entry.options_stamp = stamp
                entry.options = {}
                values = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
                entry.options = values if isinstance(values, dict) else {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            pass
        return entry.options

    def _lives(self, name: str, last: dict[str, Any], modified: float) -> bool:
        """Whether a run goes on: not at its end, and a process holds it; or, where that cannot be known, written to
        lately."""
        progress = last.get("progress", last.get("last", {}).get("progress")) or 0.0
        if progress >= 1:
            return False
        process = holder(self.root / name)
        return bool(process) if process is not None else time.time() - modified < _LIVE_S
