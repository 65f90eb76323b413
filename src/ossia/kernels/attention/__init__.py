"""Causal attention with sinks: one logit per head that takes its share of the softmax and gives nothing.

`attention(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window, bounds)`: N query heads share M key-value heads; position t
attends to itself and all before, or to the last `window` positions, itself included. With `bounds`, int32 from 0 to
B·S, the flattened batch is documents from each bound to the next, none of which sees another or spans two sequences.
Gradients go to q, k and v; sinks are frozen.

`reference` runs anywhere. On a GPU (Ampere or newer, bfloat16), in memory linear in S, `fastest` takes for each call
`window` for short windows (Triton), `cudnn` for whole sequences where `worth_cudnn` has said so, and `flash`
(FlashAttention 2) for everything else.
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
from torch import Tensor

from ossia.kernels.attention.cudnn import attention as cudnn
from ossia.kernels.attention.flash import attention as flash
from ossia.kernels.attention.reference import attention as reference
from ossia.kernels.available import HAS_TRITON

__all__ = ["cudnn", "fastest", "flash", "reference", "worth_cudnn"]

# cuDNN builds a plan for each new shape, which takes 0.15 s on an H100: about what FlashAttention loses on eight
# batches of 4 × 4,096 tokens in 12 layers. A shape that has come thrice at that size is likely to come again.
_WORTH_A_PLAN = 2 * 4 * 4096**2
_spent: Counter[tuple[int, int]] = Counter()


def fastest(
    q_BSND: Tensor,
    k_BSMD: Tensor,
    v_BSMD: Tensor,
    sinks_N: Tensor,
    scale: float,
    window: int | None = None,
    bounds: Tensor | None = None,
    longest: int | None = None,
    whole_by_cudnn: bool = False,
) -> Tensor:
    """[B, S, N, D] bfloat16, from bfloat16 tensors on a GPU; `longest` is that of `flash`."""
    length = q_BSND.shape[1]
    if window is not None and window < length and HAS_TRITON:
        from ossia.kernels.attention.window import attention as windowed

        return windowed(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window, bounds)
    if whole_by_cudnn and bounds is None and (window is None or window >= length):
        return cudnn(q_BSND, k_BSMD, v_BSMD, sinks_N, scale)
    return flash(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window, bounds, longest)


def worth_cudnn(batch: int, length: int, device: torch.device) -> bool:
    """Whether whole sequences of this shape go to cuDNN from now on; asked once a batch, counts its work."""
    if length == 1 or not _has_cudnn(device):
        return False
    _spent[batch, length] += batch * length**2
    return _spent[batch, length] > _WORTH_A_PLAN


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and torch.backends.cudnn.is_available()
