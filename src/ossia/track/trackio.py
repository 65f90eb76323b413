"""trackio: a local database and a page of its own, no account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ossia.console import tool
from ossia.track.base import RunInfo
from ossia.track.child import ChildTracker, Ending, run_settings


class TrackioTracker(ChildTracker):
    """One run of trackio, under TRACKIO_DIR or where trackio keeps its runs."""

    name = "trackio"
    extra = "trackio"

    def options(self, run: RunInfo) -> dict[str, Any]:
        self._project = run.project
        config = {**run_settings(run), "tags": list(run.tags)}
        return {"project": run.project, "name": run.name, "config": config}

    def where(self, reply: dict[str, str]) -> str:
        return f"trackio: {tool('trackio')} show --project {self._project}"


class _Session:
    def __init__(self, run: Any) -> None:
        self._run = run
        self.reply = {"id": str(run.name)}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def text(self, name: str, value: str, step: int) -> None:
        import trackio

        self._run.log({name: trackio.Markdown(value)}, step=step)

    def page(self, name: str, path: Path, step: int) -> None:
        import trackio

        self._run.log({name: trackio.Html(path.read_text(encoding="utf-8"))}, step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish()


def connect(options: dict[str, Any]) -> _Session:
    """`trackio.init`, local, without its page."""
    import trackio

    resume = "allow" if options.pop("id") else "never"
    run = trackio.init(**options, resume=resume, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    return _Session(run)
