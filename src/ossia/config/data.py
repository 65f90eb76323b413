"""Options of `ossia data …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.config.parts import DATA_TITLES, MODEL_TITLES, DataOptions, TemplateOptions
from ossia.errors import UsageError

_TITLES = {**MODEL_TITLES, **DATA_TITLES, "run": "run"}


@dataclass
class DataCommand(DataOptions, TemplateOptions, Config):
    """What every `ossia data` command takes."""

    group_titles: ClassVar[dict[str, str]] = _TITLES

    model: str | None = opt(None, "folder or hub id with tokenizer and config; no weights needed", group="model")
    rows: int = opt(20, "conversations on the page that --html writes; 0: none")
    format: str = opt("text", "text for people; json: one object", choices=["text", "json"])
    html: str | None = opt(None, "write a page to this file: figures, and rows with their tokens coloured")

    def validate(self) -> None:
        self.validate_data()
        if self.model is None:
            raise UsageError("give --model DIR (a folder with tokenizer.json and config.json)")
        if not self.dataset:
            raise UsageError("give --dataset FILE")
        if self.rows < 0:
            raise UsageError(f"--rows is {self.rows}; it must be 0 or more")
        if self.html is not None:
            path = Path(self.html).expanduser()
            if path.is_dir() or not path.parent.is_dir():
                reason = "is a folder" if path.is_dir() else f"no folder {path.parent}"
                raise UsageError(f"--html {self.html}: {reason}; give the name of a file to write")


@dataclass
class PreviewConfig(DataCommand):
    """Show rows as a person reads them and as the model is trained on them."""

    rows: int = opt(3, "rows to show; 0: all")
    format: str = opt("text", "text for people; json: one object a row", choices=["text", "json"])
    html: str | None = opt(None, "write the rows to this file as a page instead, tokens coloured")


@dataclass
class CheckConfig(DataCommand):
    """Read everything and say what is wrong with it."""

    on_bad_row: str = opt("skip", "rows that cannot be read are counted", group="data", choices=["skip"])


@dataclass
class StatsConfig(CheckConfig):
    """Read everything and measure it."""
