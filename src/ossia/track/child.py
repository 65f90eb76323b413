"""A tracker's library in a process of its own.

Such libraries take over `sys.excepthook`, exit handlers that wait for the network, SIGINT or stdout, and block for as
long as they like. In a child process none of that reaches training: a hung call is ended by killing it, and when
training itself is killed the child hears of it and closes its run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ossia.errors import OssiaError
from ossia.track.base import RunInfo, Status

LINGER_S = 60.0
_CHILD = "from ossia.track.child import serve; serve()"

Ending = str
"""A Status, or `lost`: the training process ended without a word."""


class Session(Protocol):
    """A library's run, in the child."""

    reply: dict[str, str]
    """What `ChildTracker.where` is told; `id` is the library's name for the run, by which one goes on with it."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def text(self, name: str, value: str, step: int) -> None: ...

    def page(self, name: str, path: Path, step: int) -> None: ...

    def close(self, ending: Ending) -> None: ...


class ChildTracker:
    """The training process's side. A subclass names its library and what `connect(options)` of its module takes."""

    name: str
    extra: ClassVar[str]
    """Ossia's extra that brings the library, which is also the last part of the module's name."""
    start_limit: float = 60.0
    hint: str = ""
    """Ends a line about an answer that didn't come."""

    def __init__(self) -> None:
        self.run_id: str | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def packages(self) -> tuple[str, ...]:
        """What must be installed."""
        return (self.extra,)

    def options(self, run: RunInfo) -> dict[str, Any]:
        """For `connect`, as JSON."""
        raise NotImplementedError

    def where(self, reply: dict[str, str]) -> str | None:
        """The line for the user."""
        raise NotImplementedError

    def start(self, run: RunInfo) -> str | None:
        check_installed(self.extra, self.packages())
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, self.extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a buffered pipe whose daemon thread dies mid-write aborts the interpreter at exit
            start_new_session=True,  # Ctrl+C at the terminal is for training; it tells the child
            env={**os.environ, **self.variables(run)},
        )
        self._send({**self.options(run), "id": run.run_ids.get(self.name)})
        reply = self._answer_to_start()
        if "error" in reply:
            raise OssiaError(reply["error"])
        self.run_id = reply.get("id") or None
        return self.where(reply)

    def variables(self, run: RunInfo) -> dict[str, str]:
        """More of the child's environment."""
        return {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._send({"metrics": metrics, "step": step})

    def text(self, name: str, value: str, step: int) -> None:
        self._send({"text": value, "name": name, "step": step})

    def page(self, name: str, path: Path, step: int) -> None:
        self._send({"page": str(path), "name": name, "step": step})

    def finish(self, status: Status) -> None:
        if self._child is None or self._child.stdin is None:
            return
        self._send({"finish": status})
        self._child.stdin.close()
        reply = self._read()
        if "finished" not in reply:
            raise OssiaError(reply.get("error", "its process ended before the last points were written"))
        self._child.wait()

    def _send(self, message: dict[str, Any]) -> None:
        if self._child is None or self._child.stdin is None:
            raise RuntimeError("not started")
        data = memoryview(json.dumps(message, default=str).encode() + b"\n")
        try:
            while data:
                data = data[self._child.stdin.write(data) :]
        except BrokenPipeError as error:
            raise OssiaError(self._read().get("error", "its process ended")) from error

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
            reply = {"error": f"no answer from {self.name} within {self.start_limit:g} s{self.hint}"}
        return reply or {"error": "its process ended while starting"}


def check_installed(extra: str, packages: tuple[str, ...]) -> None:
    """OssiaError naming the extra where a package is missing."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        # A folder of that name in the working directory has no file of its own.
        if spec is None or spec.origin is None:
            raise OssiaError(f"the package {package} is not installed: pip install 'ossia[{extra}]'")


def run_settings(run: RunInfo) -> dict[str, Any]:
    """A run's options and environment, under dotted keys."""
    return flat({**run.config, "environment": run.environment})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys: boards show a nested value as `[object Object]`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def serve() -> None:
    """The child: reads messages from stdin, answers twice (started, finished) on what was stdout."""
    messages, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # greetings, progress bars and advice

    def answer(**values: str) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        session: Session = importlib.import_module(f"ossia.track.{sys.argv[1]}").connect(
            json.loads(messages.readline())
        )
        answer(**session.reply)
        ending = _follow(session, messages)
        # A last upload without network retries for minutes.
        last_resort = threading.Timer(LINGER_S, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        session.close(ending)
        answer(finished="")
    except Exception as error:  # noqa: BLE001  whatever a library raises is one line for the user
        with contextlib.suppress(OSError):
            answer(error=_why(error))
        os._exit(1)
    os._exit(0)


def _follow(session: Session, messages: Any) -> Ending:
    """Pass points on until the run ends; "lost" where the training process ended first."""
    for line in messages:
        message = json.loads(line)
        if "finish" in message:
            return str(message["finish"])
        if "metrics" in message:
            session.log(message["metrics"], message["step"])
        elif "page" in message:
            session.page(message["name"], Path(message["page"]), message["step"])
        else:
            session.text(message["name"], message["text"], message["step"])
    return "lost"


def _why(error: Exception) -> str:
    """One line; never the values pydantic would quote, of which a key can be one."""
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return " ".join(str(error).split()) or type(error).__name__
