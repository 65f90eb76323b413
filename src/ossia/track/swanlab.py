"""SwanLab, through its own API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from ossia.console import tool
from ossia.errors import OssiaError
from ossia.track.base import RunInfo
from ossia.track.child import ChildTracker, Ending, run_settings

Mode = Literal["local", "cloud", "offline"]

CLOUD_LIMIT_S = 20.0
LOCAL_LIMIT_S = 60.0
_ENDINGS: dict[str, dict[str, str]] = {
    "finished": {"state": "success"},
    "failed": {"state": "crashed", "error": "the run failed"},
    "interrupted": {"state": "aborted", "error": "interrupted"},
    "lost": {"state": "crashed", "error": "the training process ended without a word"},
}


class SwanLabTracker(ChildTracker):
    """One SwanLab run. `mode` None: cloud where SWANLAB_API_KEY is set, else local.

    local: no account, no network, charts by `swanlab watch`. offline: recorded for a later `swanlab sync`.
    `start_limit` is in seconds; default 20 for cloud, 60 otherwise.
    """

    name = "SwanLab"
    extra = "swanlab"

    def __init__(
        self,
        mode: Mode | None = None,
        project: str | None = None,
        workspace: str | None = None,
        experiment_name: str | None = None,
        logdir: Path | None = None,
        start_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode or ("cloud" if os.environ.get("SWANLAB_API_KEY") else "local")
        self.project = project
        self.workspace = workspace
        self.experiment_name = experiment_name
        self.logdir = logdir
        self.start_limit = start_limit or (CLOUD_LIMIT_S if self.mode == "cloud" else LOCAL_LIMIT_S)
        self.hint = _other_mode(self.mode)

    def packages(self) -> tuple[str, ...]:
        return ("swanlab", "swanboard") if self.mode == "local" else ("swanlab",)

    def variables(self, run: RunInfo) -> dict[str, str]:
        # SWANLAB_DEBUG would write the key of ~/.swanlab/.netrc to the run's debug.log
        return {"SWANLAB_DEBUG": "false"}

    def options(self, run: RunInfo) -> dict[str, Any]:
        self._logdir = (self.logdir or run.run_dir / "swanlog").resolve()
        return {
            "mode": self.mode,
            "project": self.project or run.project,
            "workspace": self.workspace,
            "name": self.experiment_name or run.name,
            "log_dir": str(self._logdir),
            "tags": list(run.tags),
            "config": run_settings(run),
        }

    def where(self, reply: dict[str, str]) -> str:
        if self.mode == "cloud":
            return f"SwanLab (cloud): {reply['url']}"
        if self.mode == "offline":
            return f"SwanLab (offline): {tool('swanlab')} sync {reply['dir']}"
        return f"SwanLab (local): {tool('swanlab')} watch {self._logdir}"


def _other_mode(mode: str) -> str:
    return " (or use --swanlab_mode local)" if mode == "cloud" else ""


class _Session:
    def __init__(self, run: Any) -> None:
        self._run = run
        online = run.mode == "online"
        self.reply = {"url": run.url if online else "", "dir": str(run.dir), "id": str(run.id)}

    def log(self, metrics: dict[str, float], step: int) -> None:
        import swanlab

        swanlab.log(metrics, step=step)

    def text(self, name: str, value: str, step: int) -> None:
        import swanlab

        swanlab.log({name: swanlab.Text(value)}, step=step)

    def page(self, name: str, path: Path, step: int) -> None:
        import swanlab

        swanlab.log({name: swanlab.Html(str(path))}, step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish(**_ENDINGS[ending])


def connect(options: dict[str, Any]) -> _Session:
    """`swanlab.init`, or an OssiaError that says what is in the way."""
    import swanlab

    mode, name = options.pop("mode"), options.pop("id")
    if name:
        options |= {"id": name, "resume": "allow"}
    settings = swanlab.Settings(
        interactive=False,
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
        # runtime records the command line and git the remote's address, either of which can hold a token
        probe=swanlab.Settings.Probe(runtime=False, git=False),
    )
    if mode == "cloud":
        _check_cloud(settings)
    try:
        return _Session(swanlab.init(mode="online" if mode == "cloud" else mode, settings=settings, **options))
    except Exception as error:
        if mode == "cloud" and type(error).__name__ == "AuthenticationError":
            raise OssiaError(f"the API key was refused by {settings.api_host}{_other_mode(mode)}") from error
        raise


def _check_cloud(settings: Any) -> None:
    """swanlab itself blames the key where the network is missing, after 16 s or more."""
    import requests

    if not settings.api_key:
        raise OssiaError("no API key: set SWANLAB_API_KEY, or use --swanlab_mode local")
    try:
        requests.head(settings.api_host, timeout=CLOUD_LIMIT_S)
    except requests.RequestException as error:
        raise OssiaError(f"{settings.api_host} can't be reached{_other_mode('cloud')}") from error
