"""Chunked linear cross-entropy in PyTorch.

T positions, N those of a weight above 0, C those of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""What is made of a chunk's logits: `step`, or a kernel of the same signature."""


def step(
    logits_CV: Tensor, labels_C: Tensor, weights_C: Tensor, label_smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each row's `weight * loss` and 1 where its guess is right, else 0; float32 [C] both.

    logits_CV bfloat16 or float32, contiguous, are used up: `gradient` leaves that of `weight * loss` in their place.
    """
    label_C1, logits = labels_C[:, None], logits_CV.float()
    right_C = (logits.argmax(-1) == labels_C).float()
    # The highest becomes 0. Else lse of 60000 has a last place of 0.004, by which the shares would not sum to 1.
    logits.sub_(logits.amax(-1, keepdim=True))
    lse_C1 = logits.logsumexp(-1, keepdim=True)
    loss_C = (lse_C1 - logits.gather(1, label_C1))[:, 0]
    if label_smoothing:
        mean_C = lse_C1[:, 0] - logits.mean(-1)
        loss_C = (1 - label_smoothing) * loss_C + label_smoothing * mean_C
    if gradient:
        share = logits.sub_(lse_C1).exp_()
        if label_smoothing:
            share.sub_(label_smoothing / share.shape[1])
        share.scatter_add_(1, label_C1, share.new_full(label_C1.shape, label_smoothing - 1))
        logits_CV.copy_(share.mul_(weights_C[:, None]))
    return weights_C * loss_C, right_C


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    chunk: int = 1024,
    label_smoothing: float = 0.0,
    step: Step = step,
    losses_T: Tensor | None = None,
    kept_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses (float32, differentiable in `hidden_TH`) and count of right guesses (float32).

    Args:
        hidden_TH: float32 or bfloat16; the gradient has its dtype.
        weight_VH: the frozen head, same dtype.
        labels_T: int64 in [0, V); ignored where the weight is 0.
        weights_T: float32, not negative.
        chunk: positions whose logits exist at a time.
        label_smoothing: share of the loss that is the mean over all tokens, in [0, 1].
        step: what is made of a chunk's logits.
        losses_T: float32, filled with each position's weighted loss where it is above weight 0.
        kept_N: int64, the positions of weight above 0; None: looked for, for which the host waits for the device.
    """
    if kept_N is None:
        kept_N = weights_T.nonzero()[:, 0]
    trained = (kept_N, labels_T[kept_N], weights_T[kept_N].float())
    # Asked here: inside, autograd tells of `requires_grad` but not of `no_grad`.
    gradient = torch.is_grad_enabled() and hidden_TH.requires_grad
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, *trained, chunk, label_smoothing, step, gradient, losses_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        kept_N: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk: int,
        label_smoothing: float,
        step: Step,
        gradient: bool,
        losses_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(kept_N)
        loss_N, right_N = torch.empty_like(weights_N), torch.empty_like(weights_N)
        grad_NH = hidden_TH.new_empty(count, hidden_TH.shape[1]) if gradient else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for start in range(0, count, chunk):
                part = slice(start, start + chunk)
                logits_CV = hidden_TH[kept_N[part]] @ weight_VH.T
                loss_N[part], right_N[part] = step(
                    logits_CV, labels_N[part], weights_N[part], label_smoothing, gradient
                )
                if grad_NH is not None:
                    torch.mm(logits_CV, weight_VH, out=grad_NH[part])
                del logits_CV  # or they would live beside the next chunk's
        ctx.length = hidden_TH.shape[0]
        if grad_NH is not None:
            ctx.save_for_backward(kept_N, grad_NH)
        if losses_T is not None:
            losses_T[kept_N] = loss_N
        loss, correct = loss_N.sum(), right_N.sum()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept_N, grad_NH = ctx.saved_tensors
        grad_TH = grad_NH.new_zeros(ctx.length, grad_NH.shape[1])
        grad_TH.index_copy_(0, kept_N, (grad_NH * grads[0]).to(grad_NH.dtype))
        return grad_TH, *[None] * 9
