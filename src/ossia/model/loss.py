"""The loss of models that are not ours: from their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.model.gpt_oss import LossOutput


def loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    label_smoothing: float = 0.0,
    kept: Tensor | None = None,
) -> LossOutput:
    """Summed weighted loss where position t predicts label t+1.

    logits [B, S, V], labels and weights [B, S]; `kept` int64 [N] as a `Collator` gives it (None: looked for).
    """
    label, weight = (F.pad(x[:, 1:], (0, 1)).flatten() for x in (labels, loss_weights.float()))
    if kept is None:
        kept = weight.nonzero()[:, 0]
    logits_NV, label_N = logits.flatten(0, 1)[kept].float(), label[kept]
    losses_N = F.cross_entropy(logits_NV, label_N, reduction="none", label_smoothing=label_smoothing) * weight[kept]
    losses = torch.zeros_like(weight).index_copy_(0, kept, losses_N.detach()).view(loss_weights.shape)
    return LossOutput(losses_N.sum(), (logits_NV.argmax(-1) == label_N).sum().float(), losses)
