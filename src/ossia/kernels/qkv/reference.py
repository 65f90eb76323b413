"""The contract of `ossia.kernels.qkv` in PyTorch, on any device. Letters as there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ossia.kernels.lora_linear import reference as lora_linear
from ossia.kernels.rope import reference as rotary


class Adapter(NamedTuple):
    """A [r, I] and B [outputs, r], float32 or x's dtype, and a scale."""

    a: Tensor
    b: Tensor
    scale: float


def qkv(
    x: Tensor,
    weight_XI: Tensor,
    bias_X: Tensor | None,
    adapters: Sequence[Adapter],
    cos_BSD2: Tensor,
    sin_BSD2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, N, D], k and v [B, S, M, D] in x's dtype.

    Args:
        x: [B, S, I].
        weight_XI, bias_X: in x's dtype; the bias may be missing.
        adapters: of q, k and v, in that order.
        cos_BSD2, sin_BSD2: float32 [B or 1, S, D/2].
    """
    sizes = [adapter.b.shape[0] for adapter in adapters]
    biases = [None] * 3 if bias_X is None else bias_X.split(sizes)
    parts = zip(weight_XI.split(sizes), biases, adapters, strict=True)
    heads = (*x.shape[:-1], -1, 2 * cos_BSD2.shape[-1])
    q, k, v = (lora_linear(x, weight, bias, *adapter).view(heads) for weight, bias, adapter in parts)
    return rotary.rope(q, cos_BSD2, sin_BSD2), rotary.rope(k, cos_BSD2, sin_BSD2), v
