"""Causal attention with sinks: one logit per head that takes its share of the softmax and gives nothing.

`attention(q_BSND, k_BSMD, v_BSMD, sinks_N, scale, window, bounds)`: N query heads share M key-value heads; position t
attends to itself and all before, or to the last `window` positions, itself included. With `bounds`, int32 from 0 to
B·S, the flattened batch is documents from each bound to the next, none of which sees another or spans two sequences.
Gradients go to q, k and v; sinks are frozen.

`flash` runs on a GPU (Ampere or newer, bfloat16) in memory linear in S and compiles nothing; `reference` anywhere.
"""

from ossia.kernels.attention.flash import attention as flash
from ossia.kernels.attention.reference import attention as reference

__all__ = ["flash", "reference"]
