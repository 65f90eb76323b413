"""Fixtures: tiny checkpoints, shared by a test session, and the command as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    # Read when triton is first imported, which torch may do.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests import tiny
from tests.served import Server, scripted

# What a shell starts in the background ignores Ctrl-C, and so would every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


@pytest.fixture
def held_by_another() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds a run's folder, until the test or the process ends."""
    code = (
        "import sys, time; from pathlib import Path; from ossia.track.lock import hold; "
        "lock = hold(Path(sys.argv[1])); print(flush=True); time.sleep(600)"
    )
    started: list[subprocess.Popen[str]] = []

    def start(run: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gpt-oss with MXFP4 experts."""
    return tiny.gpt_oss(tmp_path_factory.mktemp("model") / "gpt-oss")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with reasoning."""
    return tiny.rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def server(tiny_gpt_oss: Path) -> Iterator[Server]:
    """`ossia serve` with an engine that says what it is told."""
    limits = ("--max_messages", 20, "--max_body_size", "200KB", "--max_new_tokens", 2000)
    with scripted(tiny_gpt_oss, *limits) as running:
        yield running


class Ossia:
    """`ossia(...)` returns the finished process; output is text."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def __call__(
        self, *args: object, stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("SWANLAB")}
        return subprocess.run(
            [sys.executable, "-m", "ossia", *map(str, args)],
            cwd=self.cwd,
            input=stdin,
            env={**variables, "HF_HUB_OFFLINE": "1", "OSSIA_CACHE": str(self.cwd.parent / "cache"), **(env or {})},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def ok(self, *args: object, **kwargs) -> str:
        """Standard output of a command that must succeed."""
        done = self(*args, **kwargs)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def fails(self, code: int, *args: object, **kwargs) -> str:
        """Standard error of a command that must end with a code."""
        done = self(*args, **kwargs)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def ossia(tmp_path) -> Ossia:
    """The command, in an empty folder."""
    return Ossia(tmp_path)


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """Answers 401 to everything."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(401)
            self.end_headers()

        do_HEAD = do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
