"""Names that gpt-oss's checkpoints, transformers and PEFT share."""

from __future__ import annotations

from typing import Literal

Projection = Literal["gate_up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("gate_up_proj", "down_proj")
