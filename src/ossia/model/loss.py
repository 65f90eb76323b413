"""The loss of models that are not ours: from their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.model.gpt_oss import LossOutput


def loss_from_logits(logits: Tensor, labels: Tensor, loss_weights: Tensor, label_smoothing: float = 0.0) -> LossOutput:
    """Summed weighted loss where position t predicts label t+1. logits [B, S, V], the others [B, S]."""
    weight = loss_weights[:, 1:].flatten().float()
    kept = weight.nonzero()[:, 0]
    logits_TV = logits[:, :-1].flatten(0, 1)[kept].float()
    label_T = labels[:, 1:].flatten()[kept]
    losses_T = F.cross_entropy(logits_TV, label_T, reduction="none", label_smoothing=label_smoothing)
    losses_T = losses_T * weight[kept]
    losses = torch.zeros_like(loss_weights[:, 1:], dtype=torch.float32)
    losses.view(-1)[kept] = losses_T.detach()
    losses = F.pad(losses, (0, 1))
    return LossOutput(losses_T.sum(), (logits_TV.argmax(-1) == label_T).sum().float(), losses)
