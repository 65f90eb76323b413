"""Our attention: registered with transformers under the name `ossia_sinks`, and the module around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssRotaryEmbedding,
    eager_attention_forward,
)

from ossia.kernels import attention
from ossia.kernels.lora_linear import lora_linears
from ossia.kernels.rope import rope

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
    whole_by_cudnn: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, N, S, D] tensors to [B, S, N, D]. A mask (padding on the left, a cache) takes transformers' eager path.

    `cu_seq_lens_q` and `max_length_q` are the documents of packed sequences, as transformers names them;
    `whole_by_cudnn` is the model's choice for the batch.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        kwargs.pop("s_aux", None)
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)
    q, k, v = (x.transpose(1, 2).to(torch.bfloat16) for x in (query, key, value))
    sinks: Tensor = module.sinks  # type: ignore[assignment]
    documents = (cu_seq_lens_q, max_length_q)
    return attention.fastest(q, k, v, sinks, scaling, sliding_window, *documents, whole_by_cudnn), None


class Attention(GptOssAttention):
    """transformers' module with the rotary embedding in float32, one kernel each for queries and keys."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] → [B, S, H] and, where the implementation gives them, the shares."""
        shape_BSND = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = _together(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (x.view(shape_BSND) for x in projected)
        query, key = (rope(x, *position_embeddings).transpose(1, 2) for x in (query, key))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BSND, shares = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(out_BSND.reshape(*hidden_states.shape[:-1], -1)), shares


def _together(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's output; in one step where all have adapters that fuse (`ossia.adapters.linear`)."""
    parts = [getattr(layer, "fusable", lambda x: None)(x) for layer in layers]
    fused = [part for part in parts if part is not None]
    return lora_linears(x, fused) if len(fused) == len(layers) else [layer(x) for layer in layers]


class RotaryEmbedding(GptOssRotaryEmbedding):
    """transformers' cosines and sines, left in float32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B or 1, S, D/2] float32 each."""
        cos, sin = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)
        return cos.contiguous(), sin.contiguous()


def supports_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `ossia_sinks` runs here: bfloat16 on an NVIDIA GPU from Ampere on."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)


ALL_ATTENTION_FUNCTIONS.register(NAME, flash_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
