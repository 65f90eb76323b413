"""Options of `ossia demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt


@dataclass
class DemoConfig(Config):
    """The whole job on a small real model: no GPU, no hub, no account."""

    group_titles: ClassVar[dict[str, str]] = {"demo": "demo", "run": "run"}

    model_name: str = opt("Ossia", "who the model shall say it is", group="demo")
    model_author: str = opt("Team Ossia", "who made it", group="demo")
    output_dir: str = opt("output/demo", "parent of the run's folder", group="demo")
    short: bool = opt(False, "a few steps only: shows that everything runs, learns little", group="demo")
    report_to: list[str] = opt(["swanlab"], "trackers besides metrics.jsonl: swanlab, or none", group="demo")
    seed: int = opt(42, "seed", group="demo")
