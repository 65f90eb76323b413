"""Weights & Biases: its cloud where WANDB_API_KEY is set, else recorded for a later `wandb sync`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from ossia.console import tool
from ossia.errors import OssiaError
from ossia.track.base import RunInfo
from ossia.track.child import ChildTracker, Ending, run_settings

_REACH_S = 15.0
_CODES = {"finished": 0, "interrupted": 130}


class WandbTracker(ChildTracker):
    """One run of wandb. `mode` None: WANDB_MODE, else online where WANDB_API_KEY is set, else offline."""

    name = "wandb"
    extra = "wandb"
    hint = " (or set WANDB_MODE=offline)"

    def __init__(self, mode: str | None = None, start_limit: float = 30.0) -> None:
        super().__init__()
        self.mode = mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.start_limit = start_limit

    def options(self, run: RunInfo) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "project": run.project,
            "name": run.name,
            "dir": str(run.run_dir.resolve()),
            "tags": list(run.tags),
            "config": run_settings(run),
        }

    def where(self, reply: dict[str, str]) -> str:
        if self.mode == "offline":
            return f"wandb (offline): {tool('wandb')} sync {reply['dir']}"
        return f"wandb: {reply['url']}"


class _Session:
    def __init__(self, run: Any) -> None:
        self._run = run
        self.reply = {"url": run.url or "", "dir": str(Path(run.dir).parent), "id": run.id}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def text(self, name: str, value: str, step: int) -> None:
        import html

        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)}, step=step)

    def page(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}, step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=_CODES.get(ending, 1))


def connect(options: dict[str, Any]) -> _Session:
    """`wandb.init`, or an OssiaError that says what is in the way."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        # The command line and the git remote can hold a token.
        x_disable_meta=True,
        disable_git=True,
        disable_code=True,
    )
    if options["mode"] == "online":
        _check_reachable(wandb.setup().settings.base_url)
    if name := options.pop("id"):
        options |= {"id": name, "resume": "allow"}
    try:
        return _Session(wandb.init(settings=settings, **options))
    except wandb.errors.AuthenticationError as error:
        raise OssiaError("the API key was refused (or set WANDB_MODE=offline)") from error
    except wandb.errors.CommError as error:
        raise OssiaError(f"{' '.join(str(error).split())[:200]} (or set WANDB_MODE=offline)") from error


def _check_reachable(url: str) -> None:
    """wandb itself tries for minutes."""
    try:
        urlopen(url, timeout=_REACH_S).close()
    except HTTPError:
        pass
    except OSError as error:
        raise OssiaError(f"{url} can't be reached (or set WANDB_MODE=offline)") from error
