"""What happens beside training: metrics to trackers, lines to people, links to checkpoints."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ossia.console import say
from ossia.track import Trackers
from ossia.track.report import duration
from ossia.train.folder import point

_RENAMED = {"train_runtime": "train_seconds", "eval_runtime": "eval_seconds"}
_DROPPED = {"total_flos", "epoch", "step"}
_DROPPED |= {f"{run}_{unit}_per_second" for run in ("train", "eval") for unit in ("samples", "steps")}


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


class InterruptCallback(TrainerCallback):
    """Makes sure that Ctrl-C ends training: where a library swallows the KeyboardInterrupt, the next step raises it."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.asked = True
        raise KeyboardInterrupt
