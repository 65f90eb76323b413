"""A linear layer and its adapter in PyTorch. I inputs, O outputs, r rank."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, scale: float
) -> Tensor:
    """[..., O] in x's dtype."""
    a, b = a_rI.to(x.dtype), b_Or.to(x.dtype)
    return F.linear(x, weight_OI, bias_O) + scale * F.linear(F.linear(x, a), b)
