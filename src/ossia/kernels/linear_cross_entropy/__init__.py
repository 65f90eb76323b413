"""Cross-entropy of a linear head without whole logits.

`linear_cross_entropy(hidden_TH, weight_VH, labels_T, weights_T, chunk, label_smoothing)` gives two sums:
`weights[t] * loss[t]`, and 1 for each position of weight above 0 whose likeliest token is the label, where of equally
likely ones the first alone counts. With `logits = hidden[t] @ weight.T`, `lse = logsumexp(logits)` and
`s = label_smoothing`,

    loss[t] = (1 - s) * (lse - logits[labels[t]]) + s * mean(lse - logits).

Logits exist for `chunk` positions at a time, rounded to hidden's dtype; all that follows is float32 up to the logits'
gradient, which is rounded to that dtype again. `losses_T` is filled with the terms of the first sum where given.
Positions of weight 0 are never multiplied at all; `kept_N` are the others, for callers whose host knows them. The head
is frozen; the gradient of `hidden` is made with the loss, so that backward only scales it.

`triton` serves bfloat16 on a GPU: one kernel a chunk that leaves the gradient where the logits were. `reference` makes
float32 copies of a chunk's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.linear_cross_entropy import reference

__all__ = ["linear_cross_entropy"]


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
    """Loss and right guesses, by the fastest implementation for the device; see `reference.linear_cross_entropy`."""
    inputs = (hidden_TH, weight_VH, labels_T, weights_T, chunk, label_smoothing)
    if hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16 and HAS_TRITON:
        from ossia.kernels.linear_cross_entropy import triton

        return triton.linear_cross_entropy(*inputs, losses_T=losses_T, kept_N=kept_N)
    return reference.linear_cross_entropy(*inputs, losses_T=losses_T, kept_N=kept_N)
