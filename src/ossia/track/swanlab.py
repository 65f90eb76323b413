"""SwanLab, through its own API, in a process of its own.

In the training process `swanlab.init` takes over `sys.excepthook`, an exit handler that waits for the network, SIGINT
and stdout, and a login without network blocks for 16 to 43 s. In a child process none of that reaches training, a hung
call is ended by killing it, and when training itself is killed the child marks the run as crashed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from ossia.console import tool
from ossia.errors import OssiaError
from ossia.track.base import RunInfo, Status

Mode = Literal["local", "cloud", "offline"]

CLOUD_LIMIT_S = 20.0
LOCAL_LIMIT_S = 60.0
LINGER_S = 60.0
INSTALL = 'pip install "ossia[swanlab]"'
_CHILD = "from ossia.track.swanlab import serve; serve()"
_ENDINGS: dict[str, dict[str, str]] = {
    "finished": {"state": "success"},
    "failed": {"state": "crashed", "error": "the run failed"},
    "interrupted": {"state": "aborted", "error": "interrupted"},
    "lost": {"state": "crashed", "error": "the training process ended without a word"},
}


class SwanLabTracker:
    """One SwanLab run. `mode` None: cloud where SWANLAB_API_KEY is set, else local.

    local: no account, no network, charts by `swanlab watch`. offline: recorded for a later `swanlab sync`.
    `start_limit` is in seconds; default 20 for cloud, 60 otherwise.
    """

    name = "SwanLab"

    def __init__(
        self,
        mode: Mode | None = None,
        project: str | None = None,
        workspace: str | None = None,
        experiment_name: str | None = None,
        logdir: Path | None = None,
        start_limit: float | None = None,
    ) -> None:
        self.mode: Mode = mode or ("cloud" if os.environ.get("SWANLAB_API_KEY") else "local")
        self.project = project
        self.workspace = workspace
        self.experiment_name = experiment_name
        self.logdir = logdir
        self.start_limit = start_limit or (CLOUD_LIMIT_S if self.mode == "cloud" else LOCAL_LIMIT_S)
        self.run_id: str | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, run: RunInfo) -> str:
        for package in ["swanlab", "swanboard"] if self.mode == "local" else ["swanlab"]:
            if importlib.util.find_spec(package) is None:
                raise OssiaError(f"the package {package} is not installed: {INSTALL}")
        logdir = (self.logdir or run.run_dir / "swanlog").resolve()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a buffered pipe whose daemon thread dies mid-write aborts the interpreter at exit
            start_new_session=True,  # Ctrl+C at the terminal is for training; it tells the child
            # SWANLAB_DEBUG would write the key of ~/.swanlab/.netrc to the run's debug.log
            env={**os.environ, "SWANLAB_DEBUG": "false"},
        )
        self._send(
            {
                "mode": self.mode,
                "project": self.project or run.project,
                "workspace": self.workspace,
                "name": self.experiment_name or run.name,
                "log_dir": str(logdir),
                "tags": list(run.tags),
                **({"id": earlier, "resume": "allow"} if (earlier := run.run_ids.get(self.name)) else {}),
                "config": _flat({**run.config, "environment": run.environment}),
            }
        )
        reply = self._answer_to_start()
        if "error" in reply:
            raise OssiaError(reply["error"])
        self.run_id = reply["id"]
        if self.mode == "cloud":
            return f"SwanLab (cloud): {reply['url']}"
        if self.mode == "offline":
            return f"SwanLab (offline): {tool('swanlab')} sync {reply['dir']}"
        return f"SwanLab (local): {tool('swanlab')} watch {logdir}"

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._send({"metrics": metrics, "step": step})

    def text(self, name: str, value: str, step: int) -> None:
        self._send({"text": value, "name": name, "step": step})

    def finish(self, status: Status) -> None:
        if self._child is None or self._child.stdin is None:
            return
        self._send({"finish": status})
        self._child.stdin.close()
        if "finished" not in self._read():
            raise OssiaError("its process ended before the last points were written")
        self._child.wait()

    def _send(self, message: dict[str, Any]) -> None:
        if self._child is None or self._child.stdin is None:
            raise RuntimeError("not started")
        data = memoryview(json.dumps(message, default=str).encode() + b"\n")
        try:
            while data:
                data = data[self._child.stdin.write(data) :]
        except BrokenPipeError as error:
            raise OssiaError("its process ended") from error

    def _read(self) -> dict[str, Any]:
        """The child's next answer; empty where it ended."""
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        return answer

    def _answer_to_start(self) -> dict[str, Any]:
        assert self._child is not None
        late = threading.Event()

        def end(child: subprocess.Popen[bytes] = self._child) -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.start_limit, end)
        timer.daemon = True
        timer.start()
        reply = self._read()
        timer.cancel()
        if late.is_set():
            reply = {"error": f"no answer from SwanLab within {self.start_limit:g} s{_other_mode(self.mode)}"}
        return reply or {"error": "its process ended while starting"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys: the local board shows a nested value as `[object Object]`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _other_mode(mode: str) -> str:
    return " (or use --swanlab_mode local)" if mode == "cloud" else ""


def serve() -> None:
    """The child: reads messages from stdin, answers twice (started, finished) on what was stdout."""
    messages, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # swanlab prints greetings, progress bars and advice

    def answer(**values: str) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        run = _init(json.loads(messages.readline()))
    except Exception as error:  # noqa: BLE001  whatever swanlab raises is one line for the user
        answer(error=_why(error))
        os._exit(1)
    answer(url=run.url if run.mode == "online" else "", dir=str(run.dir), id=run.id)
    status = _follow(run, messages)
    # a last upload without network retries for minutes
    last_resort = threading.Timer(LINGER_S, os._exit, [1])
    last_resort.daemon = True
    last_resort.start()
    run.finish(**_ENDINGS[status])
    try:
        answer(finished="")
    finally:
        os._exit(0)


def _why(error: Exception) -> str:
    """One line; never the values pydantic would quote, of which the API key can be one."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return " ".join(str(error).split()) or type(error).__name__


def _init(options: dict[str, Any]) -> Any:
    """`swanlab.init`, or an OssiaError that says what is in the way."""
    import swanlab

    mode = options.pop("mode")
    settings = swanlab.Settings(
        interactive=False,
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
        # runtime records the command line and git the remote's address, either of which can hold a token
        probe=swanlab.Settings.Probe(runtime=False, git=False),
    )
    if mode == "cloud":
        _check_cloud(settings)
    try:
        return swanlab.init(mode="online" if mode == "cloud" else mode, settings=settings, **options)
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


def _follow(run: Any, messages: Any) -> str:
    """Pass points on until the run ends; "lost" where the training process ended first."""
    import swanlab

    for line in messages:
        message = json.loads(line)
        if "finish" in message:
            return str(message["finish"])
        if "metrics" in message:
            swanlab.log(message["metrics"], step=message["step"])
        else:
            swanlab.log({message["name"]: swanlab.Text(message["text"])}, step=message["step"])
    return "lost"
