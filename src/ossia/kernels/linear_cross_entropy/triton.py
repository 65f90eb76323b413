"""Loss, right guess and gradient of a chunk's logits in one kernel, the gradient written over the logits.

C positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.linear_cross_entropy import reference

_BLOCK = 4096
# 8 logits a thread: in bfloat16 one load of 16 bytes.
_WARPS = 16


@triton.jit
def _step(
    logits,
    labels,
    weights,
    losses,
    rights,
    count,
    smoothing,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * count
    label = tl.load(labels + row).to(tl.int32)
    weight = tl.load(weights + row)
    of_label = tl.load(logits + label).to(tl.float32)
    lane = tl.arange(0, BLOCK)

    # Lanes keep sums of their own, so that only the maximum is reduced in the loop.
    highest = tl.full((), float("-inf"), tl.float32)
    exps = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    beaten = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + lane
        inside = at < count
        x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(highest, tl.max(x, 0))
        exps = exps * tl.exp(before - highest) + tl.exp(x - highest)
        if SMOOTH:
            total += tl.where(inside, x, 0.0)
        # Said this way round, a NaN beats the label.
        below = (x < of_label) | ((x == of_label) & (at >= label))
        beaten = tl.where(inside & (below == 0), 1, beaten)

    exp_sum = tl.sum(exps, 0)
    # From the highest logit, not from log-sum-exp, in which float32 would lose log(exp_sum) beside a large maximum.
    loss = (highest - of_label) + tl.log(exp_sum)
    if SMOOTH:
        mean = (highest - tl.sum(total, 0) / count) + tl.log(exp_sum)
        loss = (1.0 - smoothing) * loss + smoothing * mean
    tl.store(losses + row, weight * loss)
    tl.store(rights + row, 1.0 - tl.max(beaten, 0).to(tl.float32))

    if GRADIENT:
        scale = weight / exp_sum
        on_label = weight
        everywhere = 0.0
        if SMOOTH:
            on_label = weight * (1.0 - smoothing)
            everywhere = weight * smoothing / count
        for start in range(0, count, BLOCK):
            at = start + lane
            inside = at < count
            x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - highest) * scale - tl.where(at == label, on_label, 0.0)
            if SMOOTH:
                grad -= everywhere
            tl.store(logits + at, grad, mask=inside)


def step(
    logits_CV: Tensor, labels_C: Tensor, weights_C: Tensor, label_smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.step`; labels int64 and weights float32, contiguous. A row that holds a NaN is not right."""
    rows, count = logits_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    right_C = torch.empty_like(loss_C)
    _step[(rows,)](
        logits_CV,
        labels_C,
        weights_C,
        loss_C,
        right_C,
        count,
        float(label_smoothing),
        BLOCK=_BLOCK,
        SMOOTH=label_smoothing != 0,
        GRADIENT=gradient,
        num_warps=_WARPS,
    )
    return loss_C, right_C


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    chunk: int = 1024,
    label_smoothing: float = 0.0,
    losses_T: Tensor | None = None,
    kept_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.linear_cross_entropy`, which it is but for the step."""
    inputs = (hidden_TH, weight_VH, labels_T, weights_T, chunk, label_smoothing)
    return reference.linear_cross_entropy(*inputs, step=step, losses_T=losses_T, kept_N=kept_N)
