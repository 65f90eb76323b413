"""Trackers: what is written, and that none of them can slow or stop a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ossia.console import tool
from ossia.errors import UsageError
from ossia.track import RunInfo, Trackers, check_names, make_trackers, read_metrics
from ossia.track.jsonl import JsonlTracker
from ossia.track.swanlab import SwanLabTracker

KEY = "sk-never-to-be-seen"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no home configuration and no proxy of the machine reaches SwanLab."""
    for name in list(os.environ):
        if name.startswith("SWANLAB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "home"))


class Fake:
    """Keeps what it gets; `on` maps a method's name to something to do instead."""

    def __init__(self, name: str = "fake", **on: Callable[[], Any]) -> None:
        self.name = name
        self.on = on
        self.got: list[Any] = []

    def _do(self, method: str, *values: Any) -> Any:
        self.got.append((method, *values))
        return self.on[method]() if method in self.on else None

    def start(self, run: RunInfo) -> str | None:
        return self._do("start")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._do("log", metrics, step)

    def text(self, name: str, value: str, step: int) -> None:
        self._do("text", name, value, step)

    def page(self, name: str, path: Path, step: int) -> None:
        self._do("page", name, path, step)

    def finish(self, status: str) -> None:
        self._do("finish", status)


def fail() -> None:
    raise RuntimeError("board\nis full")


def hang() -> None:
    threading.Event().wait()


def info(run_dir: Path) -> RunInfo:
    return RunInfo(run_dir=run_dir, project="ossia-test", name="a run", config={"lora_rank": 8})


def run_with(
    threaded: list[Fake], tmp_path: Path, steps: int = 40, pause: float = 0.01, **limits: Any
) -> tuple[list[str], float, float]:
    """The lines said, the seconds of the training loop beyond its pauses, the seconds of finish()."""
    lines: list[str] = []
    trackers = Trackers([JsonlTracker()], threaded, say=lines.append, **limits)
    trackers.start(info(tmp_path))
    lost = 0.0
    for step in range(steps):
        time.sleep(pause)
        begun = time.monotonic()
        trackers.log({"loss": 1.0 / (step + 1)}, step)
        lost += time.monotonic() - begun
    begun = time.monotonic()
    trackers.finish("finished")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == steps
    return lines, lost, time.monotonic() - begun


# metrics.jsonl


def test_jsonl_numbers_only_and_nonfinite_as_null(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(info(tmp_path))
    before = time.time()
    tracker.log({"loss": 0.5, "nan": NAN, "inf": -INF, "word": "x", "flag": True}, 3)  # type: ignore[dict-item]
    (row,) = read_metrics(tmp_path / "metrics.jsonl")  # flushed: readable before finish()
    tracker.finish("finished")
    assert abs(row.pop("time") - before) < 60
    assert row == {"step": 3, "loss": 0.5, "nan": None, "inf": None}


@pytest.mark.parametrize("torn", ['{"step": 2, "ti', "x" * 200_000, ""])
def test_jsonl_torn_line_is_cut_on_resume(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    tracker = JsonlTracker()
    tracker.start(info(tmp_path))
    tracker.log({"loss": 1.0}, 2)
    tracker.finish("finished")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_jsonl_with_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    assert read_metrics(path) == []
    JsonlTracker().start(info(tmp_path))
    assert path.read_text() == ""


# the composite


def test_order_and_status(tmp_path: Path) -> None:
    fake = Fake(start=lambda: "look there")
    lines: list[str] = []
    trackers = Trackers(threaded=[fake], say=lines.append)
    trackers.start(info(tmp_path))
    trackers.log({"loss": 1.0}, 1)
    trackers.text("sample", "hello", 1)
    trackers.finish("interrupted")
    trackers.finish("finished")
    assert fake.got == [
        ("start",),
        ("log", {"loss": 1.0}, 1),
        ("text", "sample", "hello", 1),
        ("finish", "interrupted"),
    ]
    assert lines == ["look there"]


def test_not_finite_is_skipped_and_said_once(tmp_path: Path) -> None:
    fake = Fake()
    lines: list[str] = []
    trackers = Trackers(threaded=[fake], say=lines.append)
    trackers.start(info(tmp_path))
    trackers.log({"loss": NAN, "rate": 0.1}, 1)
    trackers.log({"loss": INF}, 2)
    trackers.log({"loss": 1.0}, 3)
    trackers.finish("finished")
    assert [call for call in fake.got if call[0] == "log"] == [("log", {"rate": 0.1}, 1), ("log", {"loss": 1.0}, 3)]
    assert lines == ["step 1: loss is nan; such points are left out of fake"]


def test_fails_at_start(tmp_path: Path) -> None:
    good = Fake("good")
    lines, lost, _ = run_with([Fake("bad", start=fail), good], tmp_path)
    assert lines == ["bad not started: board is full; the run goes on without it"]
    assert lost < 0.5
    assert len(good.got) == 42


def test_hangs_at_start_and_is_closed_when_it_wakes(tmp_path: Path) -> None:
    wake = threading.Event()
    late = Fake("late", start=wake.wait)
    lines, _, _ = run_with([late], tmp_path, start_limit=0.2)
    assert lines == ["late not started: no answer within 0.2 s; the run goes on without it"]
    wake.set()
    deadline = time.monotonic() + 5
    while len(late.got) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert late.got == [("start",), ("finish", "failed")]


def test_raises_in_the_middle(tmp_path: Path) -> None:
    good = Fake("good")
    lines, lost, _ = run_with([Fake("bad", log=fail), good], tmp_path)
    assert lines == ["bad dropped: board is full; the run goes on without it"]
    assert lost < 0.5
    assert len(good.got) == 42


def test_hangs_in_the_middle(tmp_path: Path) -> None:
    good = Fake("good")
    lines, lost, took = run_with([Fake("stuck", log=hang), good], tmp_path, stall_limit=0.1)
    assert len(lines) == 1
    assert lines[0].startswith("stuck dropped: no progress for")
    assert lost < 0.5
    assert took < 5
    assert len(good.got) == 42


def test_falls_behind(tmp_path: Path) -> None:
    lines, lost, _ = run_with([Fake("stuck", log=hang)], tmp_path, queue_points=8)
    assert lines == ["stuck dropped: 8 points behind; the run goes on without it"]
    assert lost < 0.5


def test_slow_at_finish(tmp_path: Path) -> None:
    good = Fake("good")
    lines, _, took = run_with([Fake("slow", finish=hang), good], tmp_path, finish_limit=0.3)
    assert lines == ["slow still not done 0.3 s after the end of the run; left behind"]
    assert took < 5
    assert good.got[-1] == ("finish", "finished")


def test_failing_direct_tracker_is_dropped(tmp_path: Path) -> None:
    lines: list[str] = []
    trackers = Trackers([Fake("disk", log=fail)], say=lines.append)
    trackers.start(info(tmp_path))
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 1.0}, 2)
    trackers.finish("finished")
    assert lines == ["disk dropped: board is full; the run goes on without it"]


def test_a_hung_tracker_does_not_hold_the_process(tmp_path: Path) -> None:
    code = (
        "import threading, pathlib, sys\n"
        "from ossia.track import RunInfo, Trackers\n"
        "class Stuck:\n"
        "    name = 'stuck'\n"
        "    def start(self, run): threading.Event().wait()\n"
        "t = Trackers(threaded=[Stuck()], say=print, start_limit=0.1)\n"
        "t.start(RunInfo(pathlib.Path('.'), 'p', 'n'))\n"
        "sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=30, capture_output=True).returncode == 7


# make_trackers


def test_names() -> None:
    check_names(["none"])
    check_names(["swanlab"])
    with pytest.raises(UsageError, match=r"swanlb: unknown tracker; did you mean 'swanlab'\?; one of"):
        check_names(["swanlb"])
    with pytest.raises(UsageError, match="none can't be combined"):
        check_names(["none", "swanlab"])


def test_none_means_files_only_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    for report_to, folder in ((["none"], tmp_path / "rank0"), (None, tmp_path / "rank1")):
        trackers = make_trackers(report_to, say=lines.append, run_dir=folder, project="p", name="n")
        trackers.log({"loss": 1.0}, 1)
        trackers.finish("finished")
    assert {path.name for path in (tmp_path / "rank0").iterdir()} == {"metrics.jsonl", "report.html", "run.json"}
    assert not (tmp_path / "rank1").exists()
    assert lines == []


# SwanLab itself

SCRIPT = """
import sys, time
from pathlib import Path
from ossia.track import make_trackers
hook = sys.excepthook
trackers = make_trackers(["swanlab"], say=print, run_dir=Path("run"), project="ossia-test", name="a run",
                         config={"lora_rank": 8, "hub_token": "hf_hidden"}, environment={"python": "3"})
assert sys.excepthook is hook and "swanlab" not in sys.modules
for step in range(1, 6):
    trackers.log({"loss": 1 / step if step != 3 else float("nan")}, step)
trackers.text("sample", "an answer", 5)
"""


def board(run_dir: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(run_dir / "swanlog" / "runs.swanlab") as database:
        return database.execute("select name, status from experiment").fetchall()


def points(run_dir: Path) -> list[dict[str, Any]]:
    (log,) = run_dir.glob("swanlog/run-*/logs/1/1000.log")
    return [json.loads(line) for line in log.read_text().splitlines()]


def everything_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_local_writes_a_board_and_keeps_the_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + "trackers.finish('finished')\nsys.exit(3)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    run_dir = tmp_path / "run"
    assert (done.returncode, done.stderr) == (3, "")
    where, left_out = done.stdout.splitlines()
    assert re.fullmatch(rf"SwanLab \(local\): (\S+/)?swanlab watch {run_dir}/swanlog", where)
    assert left_out == "step 3: loss is nan; such points are left out of SwanLab"
    assert board(run_dir) == [("a run", 1)]
    assert [(p["index"], p["data"]) for p in points(run_dir)] == [(1, 1.0), (2, 0.5), (4, 0.25), (5, 0.2)]
    assert [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1.0, 0.5, None, 0.25, 0.2]
    files = everything_under(run_dir)
    assert b"lora_rank" in files
    assert b"environment.python" in files
    assert b"an answer" in files
    assert b"hf_hidden" not in files


def test_killed_training_is_marked_as_crashed(tmp_path: Path) -> None:
    code = SCRIPT + "print('ready', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "ready\n" for line in process.stdout)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while board(tmp_path / "run") != [("a run", -1)] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert board(tmp_path / "run") == [("a run", -1)]
    assert len(points(tmp_path / "run")) == 4


def say_of(tracker: SwanLabTracker, tmp_path: Path) -> tuple[list[str], float]:
    lines: list[str] = []
    trackers = Trackers([JsonlTracker()], [tracker], say=lines.append)
    begun = time.monotonic()
    trackers.start(info(tmp_path / "run"))
    took = time.monotonic() - begun
    trackers.log({"loss": 1.0}, 1)
    trackers.finish("finished")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert KEY not in "".join(lines)
    assert KEY.encode() not in everything_under(tmp_path)
    return lines, took


def test_offline_names_the_sync_command(tmp_path: Path) -> None:
    lines, _ = say_of(SwanLabTracker("offline"), tmp_path)
    (folder,) = tmp_path.glob("run/swanlog/run-*")
    assert lines == [f"SwanLab (offline): {tool('swanlab')} sync {folder}"]


def test_cloud_without_a_key(tmp_path: Path) -> None:
    lines, _ = say_of(SwanLabTracker("cloud"), tmp_path)
    assert lines == [
        "SwanLab not started: no API key: set SWANLAB_API_KEY, or use --swanlab_mode local; the run goes on without it"
    ]


def test_a_key_means_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SwanLabTracker().mode == "local"
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    assert SwanLabTracker().mode == "cloud"
    assert SwanLabTracker("local").mode == "local"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers, as a network that swallows packets does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_cloud_without_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", silent_server)
    lines, took = say_of(SwanLabTracker(start_limit=3), tmp_path)
    assert lines == [
        "SwanLab not started: no answer from SwanLab within 3 s (or use --swanlab_mode local); "
        "the run goes on without it"
    ]
    assert 3 <= took < 10


def test_cloud_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", "http://127.0.0.1:9")
    lines, _ = say_of(SwanLabTracker(), tmp_path)
    assert lines == [
        "SwanLab not started: http://127.0.0.1:9 can't be reached (or use --swanlab_mode local); "
        "the run goes on without it"
    ]


def test_cloud_with_a_refused_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing_server: str) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", refusing_server)
    lines, _ = say_of(SwanLabTracker(), tmp_path)
    assert lines == [
        f"SwanLab not started: the API key was refused by {refusing_server} (or use --swanlab_mode local); "
        "the run goes on without it"
    ]


def test_bad_project_name_is_one_line_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    lines, _ = say_of(SwanLabTracker("local", project="no spaces please"), tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith("SwanLab not started: project.name: ")


def test_its_process_killed_in_the_middle(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = SwanLabTracker("offline")
    trackers = Trackers(threaded=[tracker], say=lines.append)
    trackers.start(info(tmp_path))
    assert tracker._child is not None
    tracker._child.kill()
    tracker._child.wait()
    trackers.log({"loss": 1.0}, 1)
    trackers.finish("finished")
    assert lines[1:] == ["SwanLab dropped: its process ended"]


@pytest.mark.parametrize("missing", ["swanlab", "swanboard"])
def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    lines, _ = say_of(SwanLabTracker(), tmp_path)
    assert lines == [
        f"SwanLab not started: the package {missing} is not installed: pip install 'ossia[swanlab]'; "
        "the run goes on without it"
    ]
