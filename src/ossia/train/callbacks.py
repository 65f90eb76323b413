"""What happens beside training: metrics to trackers, lines to people, links to checkpoints."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ossia.console import is_main_process, say
from ossia.track import Trackers
from ossia.track.report import duration
from ossia.train.folder import point
from ossia.train.launch import stop_signals_to

_RENAMED = {"train_runtime": "train_seconds", "eval_runtime": "eval_seconds"}
_DROPPED = {"total_flos", "epoch", "step"}
_DROPPED |= {f"{run}_{unit}_per_second" for run in ("train", "eval") for unit in ("samples", "steps")}

_SHOW_CURSOR = b"\x1b[?25h\n"
TERMINATE, INTERRUPT, TIME_UP = REASONS = ("SIGTERM", "Ctrl-C", "--max_time")
RETRY_S = 60.0
"""Seconds until a checkpoint that could not be written is tried again."""


class TrackCallback(TrainerCallback):
    """Sends every log of the Trainer to the trackers, numbers only."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        numbers = {
            _RENAMED.get(k, k): float(v) for k, v in logs.items() if k not in _DROPPED and isinstance(v, int | float)
        }
        place = {"epoch": float(state.epoch or 0), "progress": state.global_step / max(state.max_steps, 1)}
        self.trackers.log({**numbers, **place}, state.global_step)


class LinesCallback(TrainerCallback):
    """One line per log, with what is left."""

    sample: tuple[str, str] | None = None
    """The last sample answer, which a panel shows."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            done = state.global_step - self.first
            left = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            say(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  accuracy "
                f"{logs['token_accuracy']:.3f}  rate {logs['learning_rate']:.2e}  "
                f"{logs['tokens_per_second']:,.0f} tokens/s  "
                f"{logs['memory_gb']:.1f} GB  {duration(left)} left"
            )
        elif "eval_loss" in logs:
            say(
                f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}  accuracy "
                f"{logs['eval_token_accuracy']:.3f}"
            )

    def tell(self, line: str) -> None:
        """Show a line from within a signal handler, below which print() may be under way."""
        os.write(1, f"{line}\n".encode())

    def close(self) -> None:
        """Nothing to put away, unlike a panel."""


class LinkCallback(TrainerCallback):
    """Keeps `last` and `best` in the run folder pointing at checkpoints."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        point(self.run, "last", str(self.run / f"checkpoint-{state.global_step}"))
        point(self.run, "best", state.best_model_checkpoint or str(self.run / f"checkpoint-{state.global_step}"))


class EvaluationStopped(Exception):
    """The run was asked to stop while it evaluated."""


class StopCallback(TrainerCallback):
    """Ends a run after the step in progress, with a checkpoint: on SIGTERM, on Ctrl-C, or when its time is up. Asks for
    a checkpoint that could not be written again.

    Args:
        max_seconds: how long a run may take; None: as it likes.
        began: `time.monotonic()` at its begin.
        tell: shows a line, called in a signal handler; None: nothing is shown.
    """

    def __init__(
        self, max_seconds: float | None = None, began: float = 0.0, tell: Callable[[str], None] | None = None
    ) -> None:
        self.reason = ""
        self.unsaved = ""
        self._asked = ""
        self._heard: list[float] = []
        self._retry_at = math.inf
        self._tell = tell
        self._end_at = math.inf if max_seconds is None else began + max_seconds

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals reach this object, in the main thread; a second Ctrl-C ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with stop_signals_to(self._signal):
            yield

    def _signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._asked:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)  # which a panel has hidden
            os._exit(130)
        self._asked = INTERRUPT if number == signal.SIGINT else TERMINATE
        if self._tell is not None and is_main_process():
            self._tell(f"{self._asked}: stopping after this step (Ctrl-C again: at once, nothing saved)")

    def wishes(self) -> list[float]:
        """Of this process, 0 or 1: to stop for each of `REASONS`, to save."""
        late = time.monotonic() >= self._end_at
        stop = [self._asked == TERMINATE, self._asked == INTERRUPT, late]
        return [float(wish) for wish in (*stop, time.monotonic() >= self._retry_at)]

    def hear(self, wishes: list[float]) -> None:
        """Take what all processes wish together."""
        self._heard = wishes

    def saved(self, name: str, failed: str) -> None:
        """Take how the writing of a checkpoint went; `failed` says why it is not there."""
        if failed:
            say(f"{name} not saved: {failed}; training goes on, the next try is in {RETRY_S:.0f} s or at the next save")
            self._retry_at = time.monotonic() + RETRY_S
        elif self.unsaved:
            say(f"{name} is saved; checkpoints are written again")
        if not failed:
            self._retry_at = math.inf
        self.unsaved = failed

    def end(self, control: TrainerControl) -> None:
        """Save and stop."""
        wishes = self._heard or self.wishes()
        self.reason = next(reason for reason, wish in zip(REASONS, wishes, strict=False) if wish)
        control.should_save = control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wishes = self._heard if args.world_size > 1 else self.wishes()
        if any(wishes[: len(REASONS)]):
            self.end(control)
        elif any(wishes):
            control.should_save = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size == 1 and not self.reason and any(self.wishes()[: len(REASONS)]):
            raise EvaluationStopped
