"""Where a run's numbers go: always `metrics.jsonl` and `report.html`, and the trackers named by `--report_to`.

`make_trackers` starts them, `Trackers` feeds them; one that cannot start or fails later is dropped with one line.
A new tracker is one file with the four methods of `base.Tracker` and one entry in `make_trackers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ossia.errors import OssiaError, UsageError, nearest
from ossia.track.base import RunInfo, Say, Status, Tracker, Trackers
from ossia.track.child import check_installed
from ossia.track.jsonl import JsonlTracker, read_metrics
from ossia.track.report import REPORT, ReportTracker

__all__ = [
    "TRACKERS",
    "RunInfo",
    "Status",
    "Tracker",
    "Trackers",
    "check_names",
    "make_trackers",
    "read_metrics",
]

TRACKERS = ("swanlab", "trackio", "tensorboard", "wandb", "none")
_SECRET_ENDINGS = ("_key", "_token", "_secret", "password")


def check_names(report_to: Sequence[str]) -> None:
    """UsageError for a tracker that doesn't exist, and for `none` beside others; OssiaError for one not installed."""
    for name in report_to:
        if name not in TRACKERS:
            raise UsageError(f"--report_to {name}: unknown tracker{nearest(name, TRACKERS)}; one of {list(TRACKERS)}")
    if "none" in report_to and len(set(report_to)) > 1:
        raise UsageError("--report_to none can't be combined with another tracker")
    for name in report_to:
        if name != "none":
            try:
                check_installed(name, (name,))
            except OssiaError as error:
                raise OssiaError(f"--report_to {name}: {error}") from None


def make_trackers(
    report_to: Sequence[str] | None,
    *,
    say: Say,
    run_dir: Path,
    project: str,
    name: str,
    config: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    tags: Sequence[str] = (),
    data: dict[str, Any] | None = None,
    swanlab_mode: Any = None,
    swanlab_workspace: str | None = None,
    swanlab_exp_name: str | None = None,
    swanlab_logdir: Path | None = None,
    run_ids: dict[str, str] | None = None,
) -> Trackers:
    """The started trackers of a run. `report_to` None (ranks other than 0): nothing is written at all."""
    if report_to is None:
        return Trackers(say=say)
    check_names(report_to)
    threaded: list[Tracker] = []
    if "swanlab" in report_to:
        from ossia.track.swanlab import SwanLabTracker

        threaded.append(
            SwanLabTracker(
                swanlab_mode, None, swanlab_workspace, experiment_name=swanlab_exp_name, logdir=swanlab_logdir
            )
        )
    if "trackio" in report_to:
        from ossia.track.trackio import TrackioTracker

        threaded.append(TrackioTracker())
    if "tensorboard" in report_to:
        from ossia.track.tensorboard import TensorBoardTracker

        threaded.append(TensorBoardTracker())
    if "wandb" in report_to:
        from ossia.track.wandb import WandbTracker

        threaded.append(WandbTracker())
    trackers = Trackers([JsonlTracker(), ReportTracker()], threaded, say=say, page=Path(run_dir) / REPORT)
    trackers.start(
        RunInfo(
            run_dir=Path(run_dir),
            project=project,
            name=name,
            config=_without_secrets(config or {}),
            environment=_without_secrets(environment or {}),
            tags=tuple(tags),
            data=data or {},
            run_ids=run_ids or {},
        )
    )
    return trackers


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.lower().endswith(_SECRET_ENDINGS)}
