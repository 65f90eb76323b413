"""trackio, TensorBoard and wandb: what reaches them, and what happens when they can't be reached."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ossia.errors import OssiaError
from ossia.track import RunInfo, Trackers, check_names, make_trackers, read_metrics
from ossia.track.child import ChildTracker
from ossia.track.jsonl import JsonlTracker
from ossia.track.tensorboard import TensorBoardTracker
from ossia.track.wandb import WandbTracker

KEY = "0" * 40
METRICS = {"loss": 0.5, "loss/final": 0.25, "tokens_per_second": 1234.0}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine reaches a tracker, and nothing is left on it."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_", "SWANLAB_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("HOME", str(tmp_path))


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


def info(run_dir: Path) -> RunInfo:
    return RunInfo(run_dir=run_dir, project="ossia-test", name="a run", config={"lora_rank": 8}, tags=("x",))


def test_several_at_once_get_the_same_names(tmp_path):
    needs("trackio", "tensorboard", "wandb")
    run, lines = tmp_path / "run", []
    names = ["trackio", "tensorboard", "wandb"]
    trackers = make_trackers(
        names, say=lines.append, run_dir=run, project="ossia-test", name="a run", tags=["x"], config={"lora_rank": 8}
    )
    assert len(lines) == 3, lines
    for step in (1, 2, 3):
        trackers.log({**METRICS, "loss": float("nan") if step == 2 else 0.5}, step)
    trackers.text("sample/1", "an <answer>", 3)
    ids = trackers.run_ids
    assert ids.keys() == {"trackio", "wandb"}
    trackers.finish("finished")
    assert [line for line in lines[3:] if "left out" not in line] == []

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 0.5), (3, 0.5)]
    assert {"sample/1", "options"} == set(events.Tags()["tensors"])

    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics where run_name = 'a run' order by id").fetchall()
    points = [(step, json.loads(text)) for step, text in rows]
    assert [(step, row["loss/final"]) for step, row in points if "loss/final" in row] == [
        (1, 0.25),
        (2, 0.25),
        (3, 0.25),
    ]
    assert [name for _, row in points for name in row if name in ("sample/1", "report")] == ["sample/1", "report"]

    (record,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert all(name.encode() in content for name in ("tokens_per_second", "loss/final", "lora_rank"))
    pages = [path.read_text() for path in run.glob("wandb/offline-run-*/files/media/html/**/*.html")]
    assert any("an &lt;answer&gt;" in page for page in pages)
    assert any(">finished<" in page for page in pages), "the report as it is at the end"

    again = {"run_dir": run, "project": "ossia-test", "name": "a run", "run_ids": ids}
    trackers = make_trackers(["trackio"], say=lines.append, **again)
    trackers.log({"loss": 0.1}, 4)
    assert trackers.run_ids == {"trackio": ids["trackio"]}
    trackers.finish("finished")
    with sqlite3.connect(database) as connection:
        assert connection.execute("select distinct run_name from metrics").fetchall() == [("a run",)]
        assert (4,) in connection.execute("select step from metrics").fetchall()


def lines_of(tracker: ChildTracker, run: Path, **limits: Any) -> tuple[list[str], float]:
    lines: list[str] = []
    trackers = Trackers([JsonlTracker()], [tracker], say=lines.append, **limits)
    begun = time.monotonic()
    trackers.start(info(run))
    took = time.monotonic() - begun
    trackers.log({"loss": 1.0}, 1)
    trackers.finish("finished")
    assert len(read_metrics(run / "metrics.jsonl")) == 1
    assert KEY not in "".join(lines)
    return lines, took


def test_wandb_without_network(tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    lines, _ = lines_of(WandbTracker(), tmp_path)
    assert lines == [
        "wandb not started: http://127.0.0.1:9 can't be reached (or set WANDB_MODE=offline); the run goes on without it"
    ]


def test_wandb_with_a_refused_key(tmp_path, monkeypatch, refusing_server):
    needs("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", refusing_server)
    lines, _ = lines_of(WandbTracker(), tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith("wandb not started: ")
    assert "WANDB_MODE=offline" in lines[0]


def test_one_that_hangs_is_dropped(tmp_path):
    needs("tensorboard")
    lines: list[str] = []
    tracker = TensorBoardTracker()
    trackers = Trackers([JsonlTracker()], [tracker], say=lines.append, stall_limit=0.3, finish_limit=1)
    trackers.start(info(tmp_path))
    assert tracker._child is not None
    tracker._child.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    lost = 0.0
    while len(lines) < 2 and time.monotonic() < begun + 20:
        before = time.monotonic()
        trackers.log({f"metric/{n}": float(n) for n in range(400)}, 1)
        lost = max(lost, time.monotonic() - before)
        time.sleep(0.02)
    trackers.finish("finished")
    tracker._child.kill()
    tracker._child.wait()
    assert lines[1].startswith("TensorBoard dropped: no progress for")
    assert lost < 0.5
    assert len(lines) == 2


def test_an_error_in_the_middle_is_told_in_its_words(tmp_path):
    needs("wandb")
    lines: list[str] = []
    trackers = Trackers(threaded=[WandbTracker("offline")], say=lines.append)
    trackers.start(info(tmp_path))
    trackers._put(lambda tracker: tracker.page("report", tmp_path / "nowhere.html", 1))
    deadline = time.monotonic() + 20
    while len(lines) < 2 and time.monotonic() < deadline:
        trackers.log({"loss": 1.0}, 2)
        time.sleep(0.05)
    trackers.finish("finished")
    assert len(lines) == 2
    assert lines[1].startswith("wandb dropped: [Errno 2] No such file")
    assert lines[1].endswith("the run goes on without it")


def test_a_full_disk_stops_no_run(tmp_path):
    """The most a file may have stands for the most that a disk has."""
    needs("tensorboard")
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "from ossia.track import make_trackers\n"
        "trackers = make_trackers(['tensorboard'], say=print, run_dir=Path('run'), project='p', name='n')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "resource.prlimit(CHILD, resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "for step in range(1, 2001): trackers.log({'loss': 1.0 / step}, step)\n"
        "import time; time.sleep(1)\n"
        "trackers.log({'loss': 1.0}, 2001)\n"
        "trackers.finish('finished')\n"
        "print('done')\n"
    ).replace("CHILD", "trackers._workers[0].tracker._child.pid")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "done"
    assert any(line.startswith("metrics.jsonl dropped: [Errno 27]") for line in lines), lines
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 100
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000, "the one written before stays"


@pytest.mark.parametrize("name", ["swanlab", "trackio", "tensorboard", "wandb"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *a: None if wanted == name else find(wanted, *a))
    with pytest.raises(OssiaError, match=rf"--report_to {name}: .* pip install 'ossia\[{name}\]'"):
        check_names([name])
