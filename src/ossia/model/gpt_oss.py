"""transformers' gpt-oss with our experts, a float32 router and a loss that never makes whole logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GptOssConfig, GptOssForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.masking_utils import create_sliding_window_causal_mask as create_window_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRMSNorm
from transformers.utils import ModelOutput

from ossia.compat import cache_name, take_cache
from ossia.kernels.attention import worth_cudnn
from ossia.kernels.host_rows import host_rows
from ossia.kernels.linear_cross_entropy import linear_cross_entropy
from ossia.kernels.rms_norm import add_rms_norm, rms_norm
from ossia.kernels.route import route
from ossia.model import attention
from ossia.model.experts import Experts, kept_on_host

_MASKS = ("full_attention", "sliding_attention")
_CACHE = cache_name(GptOssForCausalLM.forward)


@dataclass
class LossOutput(ModelOutput):
    """Sums over the batch's trained positions, float32 scalars: divide `loss` by a weight to get a mean.

    `losses` [B, S] are the terms of `loss`, without gradient: at t what predicting the label of t+1 costs.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None
    losses: Tensor | None = None


class ExpertLoad:
    """How many tokens each expert of each layer is given: counted on the device, one small kernel a layer, while
    `counting` is set. Padding is left out where a batch tells of it; rows that a recomputed layer sees twice
    count twice, so only shares within a layer mean something.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module in model.modules() if isinstance(module, Router)]
        first = routers[0]
        shape = (len(routers), first.weight.shape[0], first.top_k)
        self.counts_LEK = torch.zeros(shape, dtype=torch.int64, device=first.weight.device)
        self.counting = False
        self.real_T1: Tensor | None = None
        self._one = torch.ones((1, 1), dtype=torch.int64, device=first.weight.device)
        for layer, router in enumerate(routers):
            router.load, router.layer = self, layer
        for module in model.modules():
            if isinstance(module, OssiaGptOssForCausalLM):
                module.load = self

    def count(self, layer: int, index_TK: Tensor) -> None:
        """Add a layer's choices."""
        real_T1 = self._one if self.real_T1 is None else self.real_T1
        self.counts_LEK[layer].scatter_add_(0, index_TK, real_T1.expand(index_TK.shape))

    def take(self) -> Tensor:
        """Each expert's share of its layer's tokens times the experts, float32 [L, E] on the host: 1 is an even share.
        Counting begins anew."""
        counts_LE = self.counts_LEK.sum(-1).float()
        self.counts_LEK.zero_()
        return (counts_LE / counts_LE.mean(1, keepdim=True).clamp_min(1e-9)).cpu()


class Router(nn.Module):
    """Chooses each token's experts: the highest logits, weighted by a softmax over those alone. Always float32."""

    load: ExpertLoad | None = None
    layer = 0

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        shape = (config.num_local_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=torch.float32), requires_grad=False)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts' numbers and weights, [T, K] each, and `hidden_TH` for the experts."""
        index_TK, weight_TK, hidden_TH = route(hidden_TH, self.weight, self.bias, self.top_k)
        if self.load is not None and self.load.counting:
            self.load.count(self.layer, index_TK)
        return index_TK, weight_TK, hidden_TH


class MoE(nn.Module):
    """Router and experts of a layer."""

    def __init__(self, config: GptOssConfig, quantized: bool) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, quantized)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, S, H] → [B, S, H], with `residual` added where given, and the experts' weights [B·S, K]."""
        flat_TH = hidden.reshape(-1, hidden.shape[-1])
        index_TK, weight_TK, flat_TH = self.router(flat_TH)
        added = residual if residual is None else residual.reshape(flat_TH.shape)
        return self.experts(flat_TH, index_TK, weight_TK, added).view_as(hidden), weight_TK


class RmsNorm(GptOssRMSNorm):
    """transformers' norm as one kernel; float32 inside."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        return rms_norm(hidden, self.weight, self.variance_epsilon)


class Embedding(nn.Embedding):
    """An embedding whose table may rest in pinned host memory, whatever moves the model."""

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., H] on the ids' device."""
        return super().forward(ids) if self.weight.device == ids.device else host_rows(self.weight.detach(), ids)

    def _apply(self, fn: Any, recurse: bool = True) -> Embedding:
        with kept_on_host(self._parameters):
            return super()._apply(fn, recurse)


class DecoderLayer(GptOssDecoderLayer):
    """transformers' layer on our parts."""

    def __init__(self, config: GptOssConfig, layer_idx: int, quantized: bool) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = attention.Attention(config, layer_idx)
        self.mlp = MoE(config, quantized)  # type: ignore[assignment]
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, S, H] → [B, S, H]."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        hidden_states, normal = add_rms_norm(hidden_states, None, before.weight, before.variance_epsilon)
        attended, _ = self.self_attn(hidden_states=normal, attention_mask=attention_mask, **kwargs)
        total, normal = add_rms_norm(attended, hidden_states, after.weight, after.variance_epsilon)
        return self.mlp(normal, total)[0]


class OssiaGptOssForCausalLM(GptOssForCausalLM):
    """gpt-oss as transformers knows it (generation, caches, checkpoint names) on our experts.

    With `loss_weights` the forward returns a `LossOutput` instead of logits.
    """

    loss_chunk = 1024
    """Positions whose logits exist at a time in the loss."""

    load: ExpertLoad | None = None

    def __init__(self, config: GptOssConfig, quantized: bool = False) -> None:
        super().__init__(config)
        self._no_split_modules = [DecoderLayer.__name__]
        model = self.model
        model.layers = nn.ModuleList(DecoderLayer(config, i, quantized) for i in range(config.num_hidden_layers))
        model.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        model.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        model.rotary_emb = attention.RotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        real: Tensor | None = None,
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' forward; or, with `labels` [B, S] and `loss_weights` [B, S], the summed loss, of which
        `label_smoothing` is the share that asks for every token alike.

        Rows with a loss are padded on the right, or packed: then `position_ids` restart with each row and there is no
        mask (`cu_seq_lens_q` and `max_length_q` say the same to attention on the GPU; so they do without a loss).
        `real` [B, S] is 0 on padding where no mask tells, for the count of experts' tokens. `kept` are the positions
        that carry loss, as a `Collator` gives them; without them the host waits for the GPU to find them.
        """
        cache = take_cache(kwargs)
        trains, packed = loss_weights is not None and labels is not None, kwargs.get("cu_seq_lens_q") is not None
        if self.load is not None:
            mask = kwargs.get("attention_mask") if real is None else real
            self.load.real_T1 = mask.reshape(-1, 1).long() if trains and isinstance(mask, Tensor) else None
        if (trains or packed) and self.config._attn_implementation == attention.NAME:
            # Causal attention never looks right, so padding there needs no mask.
            kwargs["attention_mask"] = dict.fromkeys(_MASKS)
            if input_ids is not None and not packed:
                batch, length = input_ids.shape
                kwargs["whole_by_cudnn"] = worth_cudnn(batch, length, input_ids.device)
        elif self._needs_no_mask(input_ids, cache, **kwargs):
            kwargs["attention_mask"] = dict.fromkeys(_MASKS)
        else:
            kwargs |= self._masks(input_ids, cache, **kwargs)
        kwargs[_CACHE] = cache
        if loss_weights is None or labels is None:
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)
        hidden = self.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        head_VH, options = self.lm_head.weight, (self.loss_chunk, label_smoothing)
        losses = torch.zeros(labels.shape, device=hidden.device)
        return LossOutput(*shifted_loss(hidden, head_VH, labels, loss_weights, *options, losses, kept), losses)

    def _needs_no_mask(
        self,
        input_ids: Tensor | None,
        cache: Cache | None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> bool:
        """Whole rows without padding on the left, and nothing before them: our attention is causal by itself, where a
        mask would send it to transformers' quadratic path."""
        cached = cache is not None and (cache.get_seq_length() > 0 or getattr(cache, "is_compileable", False))
        if self.config._attn_implementation != attention.NAME or input_ids is None or cached:
            return False
        if attention_mask is None:
            return position_ids is None
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            return False
        return bool(attention_mask[:, 0].all() and (attention_mask[:, 1:] <= attention_mask[:, :-1]).all())

    def _masks(
        self,
        input_ids: Tensor | None,
        cache: Cache | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Masks of packed rows: transformers, also 5.24, makes gpt-oss's without positions, and rows see each other."""
        if input_ids is None or position_ids is None or attention_mask is not None or cache is not None:
            return {}
        like = self.model.embed_tokens.weight.new_empty(*input_ids.shape, 1)
        make = {"config": self.config, "inputs_embeds": like, "attention_mask": None, _CACHE: None}
        both = (create(**make, position_ids=position_ids) for create in (create_causal_mask, create_window_mask))
        return {"attention_mask": dict(zip(_MASKS, both, strict=True))}


def shifted_loss(
    hidden: Tensor,
    head_VH: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    chunk: int = 1024,
    label_smoothing: float = 0.0,
    losses: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss and right guesses where position t predicts label t+1. hidden [B, S, H], the others [B, S]; `losses`
    are filled where given; `kept` int64 [N] as a `Collator` gives it (None: looked for)."""
    # The last position of a row predicts nothing: weight 0 instead of a copy of all others.
    label, weight = (F.pad(x[:, 1:], (0, 1)).flatten() for x in (labels, loss_weights))
    flat_TH = hidden.flatten(0, 1)
    flat_losses = None if losses is None else losses.view(-1)
    options = (chunk, label_smoothing, flat_losses, kept)
    return linear_cross_entropy(flat_TH, head_VH.to(flat_TH.dtype), label, weight, *options)
