"""`report.html` in the run's folder: one file that needs nothing else, made of what lies there."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ossia.config import SftConfig
from ossia.config.base import read_yaml
from ossia.errors import UsageError
from ossia.track.base import RunInfo, Status
from ossia.track.files import facts_of, json_of, note, write_aside
from ossia.track.jsonl import METRICS
from ossia.track.series import MetricsReader, Series, points
from ossia.web import render, to_json

REPORT, SAMPLES, EXPERTS = "report.html", "samples.jsonl", "experts.json"
REFRESH_S = 20.0
_POINTS = 800
_NO_ANSWER = {"before": None, "after": None}
_NO_FACTS: dict[str, Any] = {"name": "", "project": "", "tags": (), "status": "", "data": {}, "environment": {}}
_SAMPLES = 12


class ChartOf(NamedTuple):
    """A chart's title and its metrics; a name that ends in / stands for all that begin so."""

    title: str
    names: tuple[str, ...]


CHARTS = (
    ChartOf("Loss", ("loss", "eval_loss")),
    ChartOf("Learning rate", ("learning_rate",)),
    ChartOf("Gradient norm", ("grad_norm",)),
    ChartOf("Tokens per second", ("tokens_per_second",)),
    ChartOf("Memory at the peak, GB", ("memory_gb",)),
    ChartOf("Token accuracy", ("token_accuracy", "eval_token_accuracy")),
    ChartOf("Share of the card's peak rate", ("peak_rate_share",)),
    ChartOf("Loss by channel", ("loss/", "eval_loss/")),
    ChartOf("Share of trained tokens by channel", ("weight_share/",)),
    ChartOf("Gradient norm by part", ("grad_norm/",)),
    ChartOf("Trained tokens seen", ("trained_tokens",)),
    ChartOf("Expert load", ("expert_load/",)),
)


class ReportTracker:
    """Writes the report at the start, while training and at the end.

    `interval` is in seconds between two writes; one that takes long waits fifty times as long for the next.
    """

    name = REPORT

    def __init__(self, interval: float = REFRESH_S) -> None:
        self.interval = interval
        self._next = 0.0
        self._status = "running"

    def start(self, run: RunInfo) -> None:
        self._folder = run.run_dir
        self._reader = MetricsReader(run.run_dir / METRICS)
        note(
            run.run_dir,
            name=run.name,
            project=run.project,
            tags=list(run.tags),
            environment=run.environment,
            data=run.data,
            started=time.time(),
        )
        self._write()

    def log(self, metrics: dict[str, float], step: int) -> None:
        if time.monotonic() >= self._next:
            self._write()

    def text(self, name: str, value: str, step: int) -> None:
        """The report reads samples from their own file."""

    def page(self, name: str, path: Path, step: int) -> None:
        """It is the page."""

    def finish(self, status: Status) -> None:
        self._status = status
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        write_report(self._folder, self._reader, self._status)
        now = time.monotonic()
        self._next = now + max(self.interval, 50 * (now - began))


def write_report(run: Path, reader: MetricsReader | None = None, status: str | None = None) -> Path:
    """Write a run's report from its folder; a `reader` of its metrics is read on. `status` None: as noted there.
    Returns the file."""
    reader = reader or MetricsReader(run / METRICS)
    reader.update()
    facts = {**_NO_FACTS, **facts_of(run)}
    facts |= {"status": status} if status else {}
    config = _config(run)
    series = reader.series
    charts = [
        {"title": chart.title, "curves": [{"name": name, **points(series[name], _POINTS)} for name in names]}
        for chart in CHARTS
        if (names := names_of(chart, series))
    ]
    experts = json_of(run / EXPERTS)
    data = {"charts": charts, "experts": experts, "running": facts["status"] == "running"}
    page = render(
        "ossia.track",
        "report.html.jinja",
        "report.js.jinja",
        title=facts["name"] or run.name,
        facts=facts,
        updated=time.strftime("%Y-%m-%d %H:%M:%S"),
        cards=_cards(reader, facts),
        progress=reader.series["progress"].last if "progress" in series else None,
        step=reader.step,
        missing=[name for name, one in series.items() if np.isnan(one.values).any()],
        charts=[chart["title"] for chart in charts],
        experts=experts,
        samples=_samples(run / SAMPLES),
        changed=_changed(config),
        options=[(name, _text(value)) for name, value in config.items()],
        data=to_json(data),
    )
    write_aside(run / REPORT, page)
    return run / REPORT


def names_of(chart: ChartOf, found: Any) -> list[str]:
    """The metrics that a chart shows, of those found."""
    return [
        name
        for wanted in chart.names
        for name in found
        if name == wanted or (wanted.endswith("/") and name.startswith(wanted))
    ]


def duration(seconds: float) -> str:
    """As `1h05m` or `3m20s`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _cards(reader: MetricsReader, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(value, name) of what is told first."""
    last = {name: one.last for name, one in reader.series.items()}
    shown = (
        ("loss", "loss", "{:.4g}"),
        ("eval_loss", "held-out loss", "{:.4g}"),
        ("token_accuracy", "tokens guessed right", "{:.1%}"),
        ("tokens_per_second", "tokens/s", "{:,.0f}"),
        ("peak_rate_share", "of the card's peak rate", "{:.1%}"),
        ("memory_gb", "GB at the peak", "{:.1f}"),
        ("trained_tokens", "trained tokens seen", "{:,.0f}"),
    )
    cards = [(form.format(last[name]), title) for name, title, form in shown if math.isfinite(last.get(name, math.nan))]
    seconds = reader.last_time - facts.get("started", reader.first_time)
    if seconds > 0:
        cards.append((duration(seconds), "so far" if facts["status"] == "running" else "in all"))
        done = last.get("progress", 0.0)
        since = done - _progress_before(reader, facts.get("started", 0.0))
        if facts["status"] == "running" and since > 0 and done < 1:
            cards.append((duration(seconds / since * (1 - done)), "left, about"))
    return cards


def _progress_before(reader: MetricsReader, started: float) -> float:
    """The share of the steps that was done when a run went on."""
    series = reader.series.get("progress", Series())
    return max((done for time, done in zip(series.times, series.values, strict=True) if time < started), default=0.0)


def _samples(file: Path) -> list[dict[str, Any]]:
    """For each prompt its answer before training and the newest one."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                one = found.setdefault(row["prompt"], {**_NO_ANSWER, "prompt": row["prompt"], "label": row["label"]})
                one["before" if row["base"] else "after"] = row
    return list(found.values())[:_SAMPLES]


def _config(run: Path) -> dict[str, Any]:
    try:
        return read_yaml(str(run / "config.yaml"))
    except UsageError:
        return {}


def _changed(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Options that differ from their default."""
    default = _defaults()
    return [(name, _text(value)) for name, value in config.items() if value != default.get(name)]


@functools.cache
def _defaults() -> dict[str, Any]:
    return SftConfig().to_dict()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
