"""The experts' MLP for few tokens, as when text is generated: what `ossia.kernels.expert_mlp` computes, forward alone.

With few tokens the weights are all that counts: `triton` reads the MXFP4 blocks of each expert that is asked for once
for every 16 rows, expands them in registers and writes nothing of them. An adapter stays apart, two thin products.
It serves a GPU (Ampere or newer) in bfloat16, with scale bytes up to `MAX_SCALE`; nothing waits for the GPU, so it may
be captured in a CUDA graph. `reference` is `expert_mlp.reference`.
"""

from __future__ import annotations

from torch import Tensor

from ossia.kernels.expert_decode import reference
from ossia.kernels.expert_mlp import Adapter, Frozen

__all__ = ["MAX_SCALE", "expert_decode", "reference"]

MAX_SCALE = 128
"""Weights of up to 12: larger scales would take one more product for every value."""


def expert_decode(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Frozen,
    down: Frozen,
    alpha: float,
    limit: float,
    residual_TH: Tensor,
    adapters: tuple[Adapter, Adapter] | None = None,
    scale: float = 1.0,
    blocks: bool = False,
) -> Tensor:
    """[T, H] in hidden's dtype; see `reference.expert_decode`. `blocks`: read them in place, as `triton` does."""
    inputs = (hidden_TH, index_TK, weight_TK, gate_up, down, alpha, limit, residual_TH, adapters, scale)
    if blocks:
        from ossia.kernels.expert_decode import triton

        return triton.expert_decode(*inputs)
    return reference.expert_decode(*inputs)
