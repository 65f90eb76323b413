"""Options of `ossia board`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.errors import UsageError


@dataclass
class BoardConfig(Config):
    """A page over all runs under a folder."""

    group_titles: ClassVar[dict[str, str]] = {"board": "board", "run": "run"}

    folder: str = opt("output", "where runs are: folders with a metrics.jsonl", group="board", positional=True)
    host: str = opt("127.0.0.1", "address to listen on; another shows the runs to others", group="board")
    port: int = opt(5090, "port to listen on; 0: any free one", group="board")

    def validate(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}; it must be in 0 to 65535")
