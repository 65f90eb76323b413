"""gpt-oss's rotary embedding: the two halves of a head turn as pairs, by an angle of position and column.

Contract, the same for every implementation in this folder; B batch, S positions, N heads, D head size:

`rope(x_BSND, cos_BSD2, sin_BSD2)` splits the last axis into `first, second` of D/2 columns each and returns
`cat(first * cos - second * sin, second * cos + first * sin)` in x's dtype. cos and sin are float32
[B or 1, S, D/2] and already hold yarn's attention factor. The gradient goes to x alone: the same turn backward,
with -sin, times the same factor.

Products are float32 (float64 for float64 inputs) and rounded once. transformers rounds cos and sin to x's dtype first,
and in bfloat16 each product and sum as well: there ours is the one closer to float32.

`triton` reads x through its strides (queries may be a view of their projection), and keeps only cos and sin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.rope import reference

__all__ = ["rope"]


def rope(x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor) -> Tensor:
    """[B, S, N, D] in x's dtype, by the fastest implementation for the device; differentiable in x.

    Args:
        x_BSND: queries or keys, floating, of any strides; a last axis that is not contiguous costs a copy.
        cos_BSD2: float32 [B or 1, S, D/2].
        sin_BSD2: like cos.
    """
    batch, length, _, size = x_BSND.shape
    shapes = [(batch, length, size // 2), (1, length, size // 2)]
    if size % 2 or cos_BSD2.shape not in shapes or sin_BSD2.shape != cos_BSD2.shape:
        raise ValueError(
            f"expected x [B, S, N, D], D even, with cos and sin [B or 1, S, D/2]; "
            f"got {list(x_BSND.shape)}, {list(cos_BSD2.shape)} and {list(sin_BSD2.shape)}"
        )
    if x_BSND.is_cuda and x_BSND.dtype != torch.float64 and HAS_TRITON:
        from ossia.kernels.rope import triton

        return triton.rope(x_BSND, cos_BSD2, sin_BSD2)
    return reference.rope(x_BSND, cos_BSD2, sin_BSD2)
