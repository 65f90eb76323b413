"""The live panel of a run on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ossia.console import is_main_process, plain
from ossia.track.report import duration
from ossia.track.series import Series, points

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def sparkline(values: list[float | None], width: int = _WIDTH) -> str:
    """The newest `width` values as blocks; a gap for None."""
    shown = values[-width:]
    known = [value for value in shown if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BLOCKS[round((value - low) * scale)] for value in shown)


class PanelCallback(TrainerCallback):
    """One panel that is drawn anew at every log; lines printed meanwhile pass above it."""

    def __init__(self, console: Any = None) -> None:
        self.console = console
        self.loss = Series()
        self.last: dict[str, float] = {}
        self.sample: tuple[str, str] | None = None
        self._live: Any = None
        self._panel: Any = None
        self._told = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from rich.live import Live

        self.started, self.first = time.monotonic(), state.global_step
        self._live = Live(self.render(state), console=self.console, refresh_per_second=2, transient=False)
        self._live.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.last |= {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" in (logs or {}):
            self.loss.add(state.global_step, time.time(), logs["loss"])
        if self._live is not None:
            self._live.update(self.render(state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def tell(self, line: str) -> None:
        """Show a line at the edge from the next redrawing on, which another thread does: fit for a signal handler."""
        self._told = line
        if self._panel is not None:
            self._panel.subtitle = line

    def close(self) -> None:
        """Leave the last panel as it is and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self, state: TrainerState) -> RenderableType:
        """The panel of a moment."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(ratio=1)
        done, total = state.global_step, max(state.max_steps, 1)
        if "loss" in self.last:
            curve = points(self.loss, _WIDTH)["y"]
            loss = Text.assemble((f"{self.last['loss']:.4f}  ", "bold"), (sparkline(curve), "cyan"))
            if "eval_loss" in self.last:
                loss.append(f"  held-out {self.last['eval_loss']:.4f}")
            rows.add_row("loss", loss)
        figures = [
            ("token_accuracy", "accuracy {:.3f}"),
            ("learning_rate", "rate {:.2e}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
            ("peak_rate_share", "{:.0%} of the card's peak"),
            ("memory_gb", "{:.1f} GB"),
        ]
        told = "   ".join(form.format(self.last[name]) for name, form in figures if name in self.last)
        if told:
            rows.add_row("now", told)
        rows.add_row("steps", ProgressBar(total=total, completed=done, width=None))
        spent = time.monotonic() - self.started
        since = done - self.first
        left = f", {duration(spent / since * (total - done))} left" if since else ""
        rows.add_row("", f"{done:,} of {total:,}, {duration(spent)}{left}")
        if self.sample:
            asked, answer = (Text(plain(" ".join(text.split()))) for text in self.sample)
            for text in (asked, answer):
                text.truncate(300, overflow="ellipsis")
            asked.stylize("dim")
            rows.add_row("sample", asked)
            rows.add_row("", answer)
        self._panel = Panel(rows, title="ossia sft", title_align="left", border_style="dim")
        self._panel.subtitle, self._panel.subtitle_align = self._told or None, "left"
        return self._panel


def on_terminal() -> bool:
    """Whether this process prints, and a panel can be drawn there."""
    return is_main_process() and sys.stdout.isatty()
