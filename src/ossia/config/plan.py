"""Options of `ossia plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import opt
from ossia.config.sft import SftConfig


@dataclass
class PlanConfig(SftConfig):
    """Say what a run of `ossia sft` with these flags will need; loads and downloads nothing."""

    group_titles: ClassVar[dict[str, str]] = {"plan": "what is planned for", **SftConfig.group_titles}

    gpu: list[str] = opt(
        [],
        "GPUs, by name ('RTX 4090' H100) or by memory that is free (24GB); default: those of this machine, else a "
        "choice of common ones",
        group="plan",
    )
    result_path: str | None = opt(None, "JSON file for the figures", group="plan")
