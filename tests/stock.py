"""transformers' own models, to hold ours against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config


def stock_base(folder: Path) -> Any:
    """gpt-oss of transformers, in float32 on the CPU.

    transformers 5.17 leaves dequantized experts in bfloat16, and computes their activation with OpenAI's constants
    whatever config.json says (the demo's base has others): both are mended here.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.alpha = getattr(model.config, "swiglu_alpha", experts.alpha)
        experts.limit = getattr(model.config, "swiglu_limit", experts.limit)
    return model.float().eval()
