"""What the product prints: lines, progress with rate and time left, and nothing from ranks other than 0."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Side = Literal["left", "right"]
Advance = Callable[[float], None]


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True in rank 0 and in a run of one process."""
    return os.environ.get("RANK", "0") == "0"


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shown_bytes(count: float) -> str:
    """`13.8 GB`, `20.1 kB`: in powers of 1,000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def say(line: str = "") -> None:
    """Print one line, from the main process only."""
    if is_main_process():
        print(line, flush=True)


def warn(line: str) -> None:
    """Print one line beside the output, on stderr, from the main process only."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: float, unit: str, beside: Callable[[], str] = str) -> Iterator[Advance]:
    """A bar on a terminal; elsewhere a plain line every ten seconds. Yields `advance(amount)`.

    Args:
        label: what goes on.
        total: what is to be done, in units.
        unit: its name.
        beside: another rate to show, as text.
    """
    if not is_main_process():
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(label, total, unit, beside) as advance:
            yield advance
    else:
        yield _Lines(label, total, unit, beside).advance


@contextmanager
def _bar(label: str, total: float, unit: str, beside: Callable[[], str]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")
        started = time.monotonic()

        def advance(amount: float) -> None:
            bar.advance(task, amount)
            rate = bar.tasks[0].completed / max(time.monotonic() - started, 1e-9)
            bar.update(task, rate=", ".join(filter(None, (f"{_amount(rate)} {unit}/s", beside()))))

        yield advance


class _Lines:
    """Progress where there is no terminal: one line every ten seconds."""

    def __init__(self, label: str, total: float, unit: str, beside: Callable[[], str]) -> None:
        self.label, self.total, self.unit, self.beside = label, total, unit, beside
        self.done = 0.0
        self.started = self.said = time.monotonic()

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.said < 10:
            return
        self.said = now
        rate = self.done / (now - self.started)
        left = (self.total - self.done) / rate if rate else float("inf")
        amounts = f"{_amount(self.done)} of {_amount(self.total)} {self.unit}"
        rates = filter(None, (f"{_amount(rate)}/s", self.beside()))
        say(f"{self.label}: {amounts}, {', '.join(rates)}, {left:.0f} s left")


def text_console() -> Console:
    """rich's console for reports: plain text is never taken for markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def grid(*justify: Side) -> Table:
    """A table without lines, of columns that lean to these sides."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for side in justify:
        table.add_column(justify=side, overflow="fold", no_wrap=side == "right")
    return table


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plain(text: str, keep: str = "") -> str:
    """Without control characters, which a terminal would obey, and lone surrogates, which cannot be written."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else "?" for c in text)


def tool(name: str) -> str:
    """How a user calls a command of this installation: its name if the shell finds it, else the path to it."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if beside.is_file() and (found is None or Path(found).resolve() != beside.resolve()):
        relative = os.path.relpath(beside)
        return str(beside) if relative.startswith("..") else relative
    return name
