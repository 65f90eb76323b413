"""Figures that are derived beside training and join the Trainer's logs before anyone reads them."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InsightCallback(TrainerCallback):
    """Comes before the callbacks that read logs.

    `flops_per_token` and `peak_flops` (of all devices together) give the share of the card's peak rate; None: unknown.
    """

    def __init__(self, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        self.rate = flops_per_token / peak_flops if flops_per_token and peak_flops else None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "tokens_per_second" in logs and self.rate is not None:
            logs["peak_rate_share"] = round(logs["tokens_per_second"] * self.rate, 4)
