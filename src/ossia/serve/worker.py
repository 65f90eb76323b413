"""The one thread that drives the engine, and the way of prompts and tokens between it and the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ossia.errors import OssiaError
from ossia.infer.engine import Engine, Sampling, Token
from ossia.serve.errors import ApiError, bad
from ossia.serve.metrics import Metrics

MOST_FAILURES = 3
"""Steps in a row that may fail before the engine counts as broken."""
_FAILED = "the engine failed on this answer; the server's log has the reason"


class Ended(NamedTuple):
    """The end of an answer: `stop` or `length`."""

    reason: str


Item = Token | Ended | ApiError


@dataclass
class Prompt:
    """What one answer is generated from."""

    ids: list[int]
    sampling: Sampling
    adapter: str | None
    model: str
    allowed: Callable[[list[int]], Any] | None = None


@dataclass(eq=False)
class _Job:
    """One prompt on its way."""

    prompt: Prompt
    work: Work
    index: int
    began: float
    request: Any = None
    tokens: int = 0
    first: float = 0.0


@dataclass(eq=False)
class Work:
    """The prompts of one HTTP request; iterate for (index, token) and (index, Ended)."""

    worker: Worker
    jobs: list[_Job] = field(default_factory=list)
    _items: asyncio.Queue[tuple[int, Item]] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        """Until every answer has ended or was stopped.

        Raises:
            ApiError: the engine failed, or the server stops.
        """
        left = len(self.jobs)
        while left:
            index, item = await self._items.get()
            if isinstance(item, ApiError):
                raise item
            left -= isinstance(item, Ended)
            yield index, item

    def stop(self, index: int) -> None:
        """Answer `index` has all it needs; it ends as if its end token had come."""
        if self.worker.forget(self.jobs[index]):
            self._items.put_nowait((index, Ended("stop")))

    def close(self) -> None:
        """Give up what is unfinished."""
        for job in self.jobs:
            self.worker.forget(job)


class Worker:
    """Owns the engine. All but the thread's own methods are called from the event loop."""

    def __init__(self, engine: Engine, max_queue: int, metrics: Metrics) -> None:
        self.engine = engine
        self.capacity = engine.max_batch_size + max_queue
        self.metrics = metrics
        self.broken: str | None = None
        self.on_broken: Callable[[], None] = lambda: None
        self._jobs: set[_Job] = set()
        # Of the thread alone; no more are in the engine than it decodes at a time, so that a failure ends no others.
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._came: list[tuple[_Job, Item]] = []
        self._inbox: queue.SimpleQueue[tuple[str, _Job | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.watch(
            lambda: sum(not job.tokens for job in self._jobs),
            lambda: sum(bool(job.request.tokens) for job in list(self._running.values())),
        )

    def start(self) -> None:
        """Begin; from within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread; False where it is still in a step after `seconds`."""
        self._inbox.put(("quit", None))
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Answers that were asked for and have not ended."""
        return len(self._jobs)

    def submit(self, prompts: Sequence[Prompt]) -> Work:
        """Queue the prompts of one request.

        Raises:
            ApiError: 429 where the queue has no room for all of them, 400 where it never will, 500 after a breakdown.
        """
        if self.broken:
            raise ApiError(500, f"the engine has failed ({self.broken})", code="engine_failed")
        if len(prompts) > self.capacity:
            raise bad(f"{len(prompts)} answers in one request; at most {self.capacity} fit into the queue", "n")
        if len(self._jobs) + len(prompts) > self.capacity:
            raise ApiError(
                429,
                f"{len(self._jobs)} answers are being worked on or wait; try again in a moment",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        work = Work(self)
        for index, prompt in enumerate(prompts):
            job = _Job(prompt, work, index, time.monotonic())
            work.jobs.append(job)
            self._jobs.add(job)
            self._inbox.put(("submit", job))
        return work

    def forget(self, job: _Job) -> bool:
        """Take a job out of the engine; False where it has ended already."""
        if job not in self._jobs:
            return False
        self._jobs.remove(job)
        self.metrics.cancelled.inc()
        self._inbox.put(("cancel", job))
        return True

    def abandon(self, error: ApiError) -> None:
        """End every job with an error."""
        for job in list(self._jobs):
            self.forget(job)
            job.work._items.put_nowait((job.index, error))

    def _deliver(self, came: list[tuple[_Job, Item]]) -> None:
        now = time.monotonic()
        counts: Counter[str] = Counter()
        for job, item in came:
            if job not in self._jobs:
                continue
            if isinstance(item, Token):
                job.tokens += 1
                counts[job.prompt.model] += 1
                if job.tokens == 1:
                    job.first = now
                    self.metrics.first_token.observe(now - job.began)
            else:
                self._jobs.remove(job)
                if job.tokens > 1 and now > job.first:
                    self.metrics.rate.observe((job.tokens - 1) / (now - job.first))
            job.work._items.put_nowait((job.index, item))
        for model, count in counts.items():
            self.metrics.answer_tokens.labels(model).inc(count)

    def _flush(self) -> None:
        """Hand what came to the event loop."""
        came, self._came = self._came, []
        if came:
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, came)

    def _run(self) -> None:
        failures = 0
        while self._take():
            try:
                # The event loop has its work while the device is at its own: both want the interpreter.
                came = self.engine.step(self._flush)
            except Exception as error:  # noqa: BLE001 - whatever it was, the answers in flight must hear of it
                traceback.print_exc()
                failures += 1
                if failures >= MOST_FAILURES or not self._clear():
                    self._break(error)
                    return
                continue
            failures = 0
            self._came += [
                (job, token) for request, token in came if (job := self._running.get(id(request))) is not None
            ]
            for key, job in list(self._running.items()):
                if job.request.finish_reason is not None:
                    del self._running[key]
                    self._came.append((job, Ended(job.request.finish_reason)))

    def _take(self) -> bool:
        """Read the inbox, waiting only where there is nothing else to do, and fill the engine; False at the end."""
        while True:
            idle = not (self.engine.busy or self._waiting)
            if idle:
                self._flush()
            try:
                kind, job = self._inbox.get(block=idle)
            except queue.Empty:
                break
            if job is None:
                return False
            if kind == "submit":
                self._waiting.append(job)
            elif job in self._waiting:
                self._waiting.remove(job)
            elif job.request is not None and self._running.pop(id(job.request), None) is not None:
                self.engine.cancel(job.request)
            self._fill()
        self._fill()
        return True

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.engine.max_batch_size:
            self._admit(self._waiting.popleft())

    def _admit(self, job: _Job) -> None:
        prompt = job.prompt
        try:
            job.request = self.engine.submit(prompt.ids, prompt.sampling, prompt.adapter, prompt.allowed)
        except OssiaError as error:
            self._came.append((job, bad(str(error))))
            return
        except Exception:  # noqa: BLE001 - as in a step
            traceback.print_exc()
            self._came.append((job, ApiError(500, _FAILED, code="engine_failed")))
            return
        self._running[id(job.request)] = job

    def _clear(self) -> bool:
        """Fail every answer in the engine and empty it; False where that fails too."""
        jobs = list(self._running.values())
        self._running.clear()
        self._came += [(job, ApiError(500, _FAILED, code="engine_failed")) for job in jobs]
        self._flush()
        try:
            for job in jobs:
                self.engine.cancel(job.request)
        except Exception:  # noqa: BLE001 - an engine in this state is given up by the caller
            traceback.print_exc()
            return False
        return True

    def _break(self, error: Exception) -> None:
        self.broken = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self._clear()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._broke)

    def _broke(self) -> None:
        self.abandon(ApiError(500, _FAILED, code="engine_failed"))
        self.on_broken()
