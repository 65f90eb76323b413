"""What a tracker is, and `Trackers`, which feeds several and keeps their failures away from training.

A threaded tracker has one daemon thread and one bounded queue: training puts a point there and goes on. One that
raises, hangs or falls behind is dropped, with one line, and the run goes on without it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "interrupted"]
Say = Callable[[str], None]

START_LIMIT_S = 90.0
STALL_LIMIT_S = 30.0
FINISH_LIMIT_S = 30.0
QUEUE_POINTS = 10_000


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told once, before training. `config` and `environment` hold no secret."""

    run_dir: Path
    project: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)
    """Of the run that this one goes on with, by tracker."""


class Tracker(Protocol):
    """Where metrics go. Any method may raise; `Trackers` deals with it."""

    name: str

    def start(self, run: RunInfo) -> str | None:
        """Begin a run; returns a line for the user saying where to look."""
        ...

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of one optimizer step."""
        ...

    def text(self, name: str, value: str, step: int) -> None:
        """A piece of text, such as a sample answer."""
        ...

    def page(self, name: str, path: Path, step: int) -> None:
        """An HTML file, such as the report; nothing where the tracker shows none."""
        ...

    def finish(self, status: Status) -> None:
        """Flush and close."""
        ...


class Trackers:
    """Several trackers as one. No method raises because of a tracker or waits for one longer than the limits.

    `direct` trackers are called in the caller's thread and get every value; `threaded` ones never get a value that
    isn't finite, and get the `page` at the end, once direct ones have written it. Limits are in seconds.
    """

    def __init__(
        self,
        direct: Sequence[Tracker] = (),
        threaded: Sequence[Tracker] = (),
        *,
        say: Say,
        page: Path | None = None,
        start_limit: float = START_LIMIT_S,
        stall_limit: float = STALL_LIMIT_S,
        finish_limit: float = FINISH_LIMIT_S,
        queue_points: int = QUEUE_POINTS,
    ) -> None:
        self._direct = list(direct)
        self._workers = [_Worker(tracker, queue_points) for tracker in threaded]
        self._say = say
        self._page = page
        self._step = 0
        self._start_limit = start_limit
        self._stall_limit = stall_limit
        self._finish_limit = finish_limit
        self._queue_points = queue_points
        self._said_not_finite = False
        self._over = False

    @property
    def names(self) -> list[str]:
        """Those still in use."""
        return [t.name for t in self._direct] + [w.tracker.name for w in self._workers]

    @property
    def run_ids(self) -> dict[str, str]:
        """What each tracker in use calls this run, where it says so."""
        trackers = [*self._direct, *(worker.tracker for worker in self._workers)]
        ids = {tracker.name: getattr(tracker, "run_id", None) for tracker in trackers}
        return {name: run_id for name, run_id in ids.items() if run_id}

    def start(self, run: RunInfo) -> None:
        """Start all, threaded ones at the same time; waits at most `start_limit`."""
        for worker in self._workers:
            worker.begin(run)
        for tracker in list(self._direct):
            self._call_direct(tracker, lambda t: t.start(run), "not started")
        deadline = time.monotonic() + self._start_limit
        for worker in list(self._workers):
            worker.started.wait(max(0.0, deadline - time.monotonic()))
            if worker.error is not None:
                self._drop(worker, f"not started: {_line(worker.error)}")
            elif not worker.started.is_set():
                self._drop(worker, f"not started: no answer within {self._start_limit:g} s")
            elif worker.where:
                self._say(worker.where)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of one optimizer step."""
        self._step = step
        for tracker in list(self._direct):
            self._call_direct(tracker, lambda t: t.log(metrics, step))
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if len(finite) < len(metrics) and self._workers and not self._said_not_finite:
            self._said_not_finite = True
            bad = ", ".join(f"{name} is {value}" for name, value in metrics.items() if name not in finite)
            names = ", ".join(worker.tracker.name for worker in self._workers)
            self._say(f"step {step}: {bad}; such points are left out of {names}")
        if finite:
            self._put(lambda t: t.log(finite, step))

    def text(self, name: str, value: str, step: int) -> None:
        """A piece of text, such as a sample answer."""
        for tracker in list(self._direct):
            self._call_direct(tracker, lambda t: t.text(name, value, step))
        self._put(lambda t: t.text(name, value, step))

    def finish(self, status: Status) -> None:
        """Flush and close all, waiting at most `finish_limit`. A second call does nothing."""
        self._over = True
        for tracker in list(self._direct):
            self._call_direct(tracker, lambda t: t.finish(status))
        self._direct = []
        if (page := self._page) is not None and page.is_file():
            self._page = None
            self._put(lambda t: t.page("report", page, self._step))
        self._put(lambda t: t.finish(status), last=True)
        deadline = time.monotonic() + self._finish_limit
        for worker in list(self._workers):
            worker.done.wait(max(0.0, deadline - time.monotonic()))
            if worker.error is not None:
                self._drop(worker, f"dropped: {_line(worker.error)}")
            elif not worker.done.is_set():
                self._drop(worker, f"still not done {self._finish_limit:g} s after the end of the run; left behind")
        self._workers = []

    def _call_direct(self, tracker: Tracker, call: Callable[[Tracker], Any], verb: str = "dropped") -> None:
        try:
            where = call(tracker)
        except Exception as error:  # noqa: BLE001  a tracker must not stop a run
            self._direct.remove(tracker)
            self._say_dropped(tracker, f"{verb}: {_line(error)}")
        else:
            if where:
                self._say(where)

    def _put(self, call: Callable[[Tracker], Any], last: bool = False) -> None:
        for worker in list(self._workers):
            stalled = worker.stalled_for()
            if worker.error is not None:
                self._drop(worker, f"dropped: {_line(worker.error)}")
            elif stalled > self._stall_limit:
                self._drop(worker, f"dropped: no progress for {stalled:.0f} s")
            elif not worker.put(call, last):
                self._drop(worker, f"dropped: {self._queue_points:,} points behind")

    def _drop(self, worker: _Worker, why: str) -> None:
        self._workers.remove(worker)
        worker.abandon()
        self._say_dropped(worker.tracker, why)

    def _say_dropped(self, tracker: Tracker, why: str) -> None:
        self._say(f"{tracker.name} {why}" + ("" if self._over else "; the run goes on without it"))


class _Worker:
    """One tracker's thread. Errors stay here until the caller's thread reads them."""

    def __init__(self, tracker: Tracker, capacity: int) -> None:
        self.tracker = tracker
        self.started = threading.Event()
        self.done = threading.Event()
        self.error: Exception | None = None
        self.where: str | None = None
        self._abandoned = False
        self._busy_since: float | None = None
        self._calls: queue.Queue[tuple[Callable[[Tracker], Any], bool]] = queue.Queue(capacity)

    def begin(self, run: RunInfo) -> None:
        threading.Thread(target=self._work, args=(run,), name=f"track-{self.tracker.name}", daemon=True).start()

    def put(self, call: Callable[[Tracker], Any], last: bool) -> bool:
        """False where the queue is full."""
        try:
            self._calls.put_nowait((call, last))
        except queue.Full:
            return False
        return True

    def stalled_for(self) -> float:
        """Seconds the call in progress has taken."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def abandon(self) -> None:
        """Make the thread end after the call in progress; a tracker that starts late is closed."""
        self._abandoned = True
        self.put(lambda t: None, last=False)

    def _work(self, run: RunInfo) -> None:
        try:
            self.where = self.tracker.start(run)
            self.started.set()
            last = False
            while not last and not self._abandoned:
                call, last = self._calls.get()
                self._busy_since = time.monotonic()
                if not self._abandoned:
                    call(self.tracker)
                self._busy_since = None
            if not last:
                self.tracker.finish("failed")
        except Exception as error:  # noqa: BLE001  a tracker must not stop a run
            self.error = error
        finally:
            self._busy_since = None
            self.started.set()
            self.done.set()


def _line(error: Exception) -> str:
    """An exception as part of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
