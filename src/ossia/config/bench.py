"""Options of `ossia bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt, parse_bytes
from ossia.errors import UsageError


@dataclass
class BenchConfig(Config):
    """Measure training on this machine, with random weights: no download, no data."""

    group_titles: ClassVar[dict[str, str]] = {"case": "what is measured", "run": "run"}

    size: str = opt(
        "20b",
        "gpt-oss's size; tiny checks the command itself, on any machine",
        group="case",
        choices=["20b", "120b", "tiny"],
    )
    per_device_train_batch_size: int = opt(4, "rows of a batch", group="case")
    max_length: int = opt(4096, "tokens of a row; each carries loss", group="case")
    lora_rank: int = opt(8, "rank of the adapters, on attention and every expert", group="case")
    gradient_checkpointing: str = opt("auto", "as in ossia sft", group="case", choices=["auto", "true", "false"])
    memory_budget: str | None = opt(None, "as in ossia sft", group="case")
    max_steps: int = opt(10, "steps; the first two are left out of the rate", group="case")
    profile: bool = opt(False, "also time the kernels of one more step", group="case")
    result_path: str | None = opt(None, "JSON file for the figures")

    def validate(self) -> None:
        for name in ("per_device_train_batch_size", "max_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_length < 2:
            raise UsageError("--max_length is 1; a token is trained by the one before it, so 2 are needed")
        if self.max_steps < 3:
            raise UsageError(f"--max_steps is {self.max_steps}; it must be at least 3")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "--memory_budget")
