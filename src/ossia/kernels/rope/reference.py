"""The contract of `ossia.kernels.rope` in PyTorch alone, on any device. B batch, S positions, N heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_BSND: Tensor, cos_BSD2: Tensor, sin_BSD2: Tensor) -> Tensor:
    """[B, S, N, D] in x's dtype; differentiable in x."""
    cos, sin = cos_BSD2.detach()[:, :, None], sin_BSD2.detach()[:, :, None]
    first, second = x_BSND.to(torch.promote_types(x_BSND.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSND.dtype)
