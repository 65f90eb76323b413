"""Options of `ossia verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.config.parts import ModelOptions, RowOptions
from ossia.errors import UsageError


@dataclass
class VerifyConfig(RowOptions, ModelOptions, Config):
    """Hold an exported model against what it was made from."""

    group_titles: ClassVar[dict[str, str]] = {
        "model": "which two",
        "compare": "what is compared",
        "data": "how rows are read",
        "limits": "how far apart they may be",
        "run": "run",
    }

    original: str | None = opt(
        None, "checkpoint folder of a LoRA run (its base is found by itself), or a model folder",
        group="model", positional=True,
    )  # fmt: skip
    exported: str | None = opt(None, "model folder made from it", group="model", positional=True)
    dataset: list[str] = opt(
        [], "rows that both read; default: those held out of the adapter's run, else a few questions", group="compare"
    )
    rows: int = opt(16, "how many of them", group="compare")
    max_length: int = opt(512, "tokens of a row that count", group="compare")
    prompts: int = opt(4, "questions that both answer, the first a fixed one that is shown", group="compare")
    max_new_tokens: int = opt(64, "tokens of an answer", group="compare")

    max_logit_error: float | None = opt(
        None, "relative error of the logits; default: 0.05, with MXFP4 in the export 0.3", group="limits"
    )
    min_agreement: float | None = opt(
        None, "share of positions with the same likeliest token; default: 0.95, with MXFP4 0.8", group="limits"
    )

    def validate(self) -> None:
        self.validate_rows()
        if self.original is None or self.exported is None:
            raise UsageError("give two folders: ossia verify RUN/checkpoint-N EXPORTED")
        for name in ("rows", "max_length", "prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")
