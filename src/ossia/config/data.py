"""Options of `ossia data …`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.config.parts import DATA_TITLES, MODEL_TITLES, DataOptions, TemplateOptions
from ossia.errors import UsageError


@dataclass
class PreviewConfig(DataOptions, TemplateOptions, Config):
    """Show rows as a person reads them and as the model is trained on them."""

    group_titles: ClassVar[dict[str, str]] = {**MODEL_TITLES, **DATA_TITLES, "run": "run"}

    model: str | None = opt(None, "folder or hub id with tokenizer and config; no weights needed", group="model")
    rows: int = opt(3, "rows to show; 0: all")
    format: str = opt("text", "text for people; json: one object a row", choices=["text", "json"])

    def validate(self) -> None:
        self.validate_data()
        if self.model is None:
            raise UsageError("give --model DIR (a folder with tokenizer.json and config.json)")
        if not self.dataset:
            raise UsageError("give --dataset FILE")
        if self.rows < 0:
            raise UsageError(f"--rows is {self.rows}; it must be 0 or more")
