"""Our attention: registered with transformers under the name `ossia_sinks`, and the module around it."""

from __future__ import annotations

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

from ossia.compat import take_cache
from ossia.kernels import attention
from ossia.kernels.lora_linear import lora_linears
from ossia.kernels.qkv import Adapter
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
    """transformers' module with the rotary embedding in float32."""

    _stacked: tuple[Tensor, Tensor | None] | None = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] → [B, S, H] and, where the implementation gives them, the shares. A cache comes under any of its
        names."""
        cache = take_cache(kwargs)
        projected = self._projected(hidden_states, *position_embeddings)
        query, key, value = (x.transpose(1, 2) for x in projected)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
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

    def stack(self) -> None:
        """Lay the frozen weights of queries, keys and values one behind another in memory, for one product of all."""
        layers = self._linears()
        weight = torch.cat([layer.weight.data for layer in layers])
        for layer, own in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = own
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self._stacked = weight, torch.cat(biases) if biases else None

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of all three, stacked."""
        if self._stacked is None:
            self.stack()
        assert self._stacked is not None
        return self._stacked

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        """What moves the weights takes them apart; transformers' Trainer asks for a move to where they are."""
        moved = super()._apply(fn, recurse)
        self._stacked = self._still_stacked()
        return moved

    def _still_stacked(self) -> tuple[Tensor, Tensor | None] | None:
        stacked = self._stacked
        return stacked if stacked and stacked[0].data_ptr() == self._linears()[0].weight.data_ptr() else None

    def _linears(self) -> list[nn.Linear]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        return [getattr(part, "base_layer", part) for part in parts]

    def _projected(self, hidden: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, S, N or M, D], the first two turned; in one step where they are stacked and
        all have adapters that fuse (`ossia.adapters.linear`)."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        fusable = [getattr(part, "fusable", lambda x: None)(hidden) for part in parts]
        layers = [layer for layer in fusable if layer is not None]
        stacked = self._still_stacked()
        if len(layers) < len(parts):
            projected = [part(hidden) for part in parts]
        elif stacked is None:
            projected = list(lora_linears(hidden, layers))
        else:
            from ossia.kernels.qkv.fused import qkv

            adapters = [Adapter(layer.a, layer.b, layer.scale) for layer in layers]
            return qkv(hidden, *stacked, adapters, cos_BSD2, sin_BSD2)
        shape_BSND = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (x.view(shape_BSND) for x in projected)
        return rope(query, cos_BSD2, sin_BSD2), rope(key, cos_BSD2, sin_BSD2), value


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
