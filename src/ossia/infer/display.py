"""Replies as they come: reasoning dim, folded or hidden, then the answer, as markdown on a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

THINK = ("show", "hide", "fold")
# A terminal would obey control characters in a reply. Zero-width joiners and wide spaces are text and stay.
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)], "\ufffd") | {13: ""}


class Display:
    """Prints the pieces of one reply; a context, so that a stopped reply leaves the terminal in order."""

    def __init__(self, console: Console, think: str, markdown: bool) -> None:
        self._console = console
        self._think = think
        self._markdown = _Blocks(console) if markdown else None
        self._channel: str | None = None
        self._started = time.monotonic()
        self._thought = self._silent = 0
        self._folded = False

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folded:
            self._fold()
        if self._markdown:
            self._markdown.close()
        if self._channel is not None and not (self._markdown and self._channel == "final"):
            self._console.print()

    def push(self, pieces: list[tuple[str, str]]) -> None:
        """Take what one token made printable."""
        self._silent += 1
        for channel, text in pieces:
            if channel == "analysis":
                # Tokens without text between two with text held part of a character.
                self._thought += self._silent if self._thought else 1
                self._silent = 0
                self._folded = self._think == "fold"
            if channel != "analysis" or self._think == "show":
                self._write(channel, text.translate(_CONTROLS))
        if pieces:
            self._silent = 0

    def _write(self, channel: str, text: str) -> None:
        if self._folded:
            self._fold()
        if self._channel is not None and channel != self._channel:
            self._console.print()
        self._channel = channel
        if self._markdown and channel == "final":
            self._markdown.write(text)
            return
        self._console.print(Text(text, style="" if channel == "final" else "dim"), end="")
        self._console.file.flush()

    def _fold(self) -> None:
        self._folded = False
        seconds = time.monotonic() - self._started
        self._console.print(f"thought: {self._thought:,} tokens, {seconds:.1f} s", style="dim")
        self._console.file.flush()


class _Blocks:
    """Markdown that grows: a block is printed for good when the next one begins, the last is redrawn below."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._printed = False
        self._live = Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def write(self, text: str) -> None:
        """Take more of the text."""
        if not self._live.is_started:
            self._live.start()
        self._tail += text
        starts = [token.map[0] for token in Markdown(self._tail).parsed if token.map and token.level == 0]
        if len(starts) > 1:
            lines = self._tail.split("\n")
            self._print("\n".join(lines[: starts[-1]]))
            self._tail = "\n".join(lines[starts[-1] :])
        # Lines above the window's top could not be redrawn.
        rows = Text(self._tail).wrap(self._console, self._console.width)[-(self._console.height - 2) :]
        self._live.update(Text("\n").join(rows), refresh=True)

    def close(self) -> None:
        """Print what is left."""
        if self._live.is_started:
            self._live.update("", refresh=True)
            self._live.stop()
        if self._tail.strip():
            self._print(self._tail)
        self._tail = ""

    def _print(self, block: str) -> None:
        if self._printed:
            self._console.print()
        self._printed = True
        self._console.print(Markdown(block), soft_wrap=False)
