"""Registers our attention with transformers, under the name `ossia_sinks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ossia.kernels import attention

# transformers takes any name with "flash" in it for a kernel of its own.
NAME = "ossia_sinks"


def flash_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, N, S, D] tensors to [B, S, N, D]. A mask (padding on the left, a cache) takes transformers' eager path.

    `cu_seq_lens_q` and `max_length_q` are the documents of packed sequences, as transformers names them.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        kwargs.pop("s_aux", None)
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)
    q, k, v = (x.transpose(1, 2).to(torch.bfloat16) for x in (query, key, value))
    sinks: Tensor = module.sinks  # type: ignore[assignment]
    return attention.flash(q, k, v, sinks, scaling, sliding_window, cu_seq_lens_q, max_length_q), None


def supports_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `ossia_sinks` runs here: bfloat16 on an NVIDIA GPU from Ampere on."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)


ALL_ATTENTION_FUNCTIONS.register(NAME, flash_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
