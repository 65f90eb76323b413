"""Chunked linear cross-entropy in PyTorch. T positions, H hidden, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses (float32, differentiable in `hidden_TH`) and count of right guesses (float32).

    Args:
        hidden_TH: float32 or bfloat16; the gradient has its dtype.
        weight_VH: the frozen head, same dtype.
        labels_T: int64 in [0, V); ignored where the weight is 0.
        weights_T: float32, not negative.
        chunk: positions whose logits exist at a time.
    """
    kept = weights_T.nonzero()[:, 0]
    if not len(kept):
        return (hidden_TH * 0).sum().float(), torch.zeros((), device=hidden_TH.device)
    return _LinearCrossEntropy.apply(hidden_TH[kept], weight_VH, labels_T[kept], weights_T[kept].float(), chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=hidden_TH.device)
        correct = torch.zeros((), device=hidden_TH.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_TH = torch.empty_like(hidden_TH) if needs_grad else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for start in range(0, hidden_TH.shape[0], chunk):
                part = slice(start, start + chunk)
                label, weight = labels_T[part, None], weights_T[part, None]
                logits = (hidden_TH[part] @ weight_VH.T).float()
                lse = logits.logsumexp(-1, keepdim=True)
                loss += (weight * (lse - logits.gather(1, label))).sum()
                correct += (logits.argmax(-1) == label[:, 0]).sum()
                if grad_TH is not None:
                    probability = logits.sub_(lse).exp_()
                    probability.scatter_add_(1, label, torch.full_like(weight, -1.0))
                    grad_TH[part] = probability.mul_(weight).to(weight_VH.dtype) @ weight_VH
        if grad_TH is not None:
            ctx.save_for_backward(grad_TH)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * grads[0]).to(grad_TH.dtype), None, None, None, None
