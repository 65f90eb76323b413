"""Options of `ossia infer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.config.parts import MODEL_TITLES, AdapterOptions, ModelOptions, RowOptions, TemplateOptions
from ossia.errors import UsageError


@dataclass
class InferConfig(RowOptions, TemplateOptions, AdapterOptions, ModelOptions, Config):
    """Talk to a model, or answer the rows of a file."""

    group_titles: ClassVar[dict[str, str]] = {
        **MODEL_TITLES,
        "template": "template",
        "generate": "generation",
        "batch": "rows of a file",
        "data": "how rows are read",
        "run": "run",
    }

    stream: bool = opt(True, "print the reply as it comes", group="generate")
    markdown: bool | None = opt(None, "render the answer; default: on a terminal, never elsewhere", group="generate")
    temperature: float = opt(1.0, "0: always the likeliest token", group="generate")
    top_p: float = opt(1.0, "share of probability that sampling draws from", group="generate")
    max_new_tokens: int = opt(2048, "tokens a reply may have", group="generate")
    seed: int = opt(42, "seed of sampling", group="generate")

    val_dataset: list[str] = opt([], "answer these rows instead of a conversation", group="batch")
    result_path: str | None = opt(None, "JSONL file for the answers", group="batch")
    max_batch_size: int = opt(32, "rows answered at a time", group="batch")
    logprobs: bool = opt(False, "write each token's log-probability", group="batch")
    top_logprobs: int = opt(0, "likeliest tokens written beside each, with --logprobs true", group="batch")
    resume: bool = opt(True, "go on with what a killed run left in RESULT.part; false: start anew", group="batch")

    def validate(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p is {self.top_p}; it must be in (0, 1]")
        for name in ("max_new_tokens", "max_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}; it must be in [0, 2^32)")
        self.validate_adapters()
        if self.model is None and not self.adapters:
            raise UsageError("give --model DIR, or --adapters RUN/checkpoint-N")
        if not 0 <= self.top_logprobs <= 20:
            raise UsageError(f"--top_logprobs is {self.top_logprobs}; it must be 0 to 20")
        if self.top_logprobs and not self.logprobs:
            raise UsageError("--top_logprobs goes with --logprobs true")
        self.validate_rows()
        untouched = RowOptions()
        given = [name for name, value in vars(untouched).items() if getattr(self, name) != value]
        given += [name for name in ("logprobs", "result_path") if getattr(self, name)]
        if given and not self.val_dataset:
            raise UsageError(f"--{given[0]} goes with --val_dataset FILE")
