"""Each token's experts: the highest of a linear map's outputs, weighted by a softmax over those alone.

`route(hidden_TH, weight_EH, bias_E, top_k)` gives `index_TK` (int64), `weight_TK` (float32) and `hidden_TH` itself,
for what reads it next: the two gradients are summed in one pass. The logits
`hidden @ weight.T + bias` are float32 throughout, under autocast too. Experts come by falling logit, of equal ones the
lowest number first, NaN counting as highest: K different experts whatever the input. Only `hidden` gets a gradient,
in its own dtype; the router is frozen.

`triton` serves a GPU in one kernel each way and keeps for backward nothing of the size of `hidden`. `reference` keeps a
float32 copy of it where it is bfloat16, and on a GPU multiplies in TF32 where torch is told to.
"""

from __future__ import annotations

from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.route import reference

__all__ = ["route"]


def route(hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, their weights and `hidden_TH`, by the fastest implementation for the device; see `reference.route`."""
    if hidden_TH.is_cuda and HAS_TRITON:
        from ossia.kernels.route import triton

        return triton.route(hidden_TH, weight_EH, bias_E, top_k)
    return reference.route(hidden_TH, weight_EH, bias_E, top_k)
