"""Queries, keys and values of one input, with adapters, queries and keys turned by their positions.

B batch, S positions, I inputs, N query and M key-value heads, D head size, X = (N + 2M) · D, r an adapter's rank.

The frozen weights stand in one `weight_XI` and `bias_X`: queries first, then keys, then values. `Adapter(a, b, scale)`
of each adds `scale · (x Aᵀ) Bᵀ`, as in `lora_linear`; what comes out is turned as in `rope`. Gradients go to x and to
every A and B. `reference` is those two in a row. `fused` takes one product for all three weights and one for all three
adapters (B of each in its own columns and rows of one matrix, zeros elsewhere) and turns in place, on a GPU.
"""

from ossia.kernels.qkv.reference import Adapter
from ossia.kernels.qkv.reference import qkv as reference

__all__ = ["Adapter", "reference"]
