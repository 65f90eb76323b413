"""Frozen linear layers of one input, each with a low-rank adapter: `x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`.

`lora_linears(x, layers)` gives one output a layer; gradients go to x and to every A and B. The adapters' sums ride in
the epilogues of their second thin products, forward and backward, and the layers' gradients of x in those of one
another, so no pass over outputs is spent on either. A and B are rounded to x's dtype for the products and get their
gradients in float32. `reference` is one layer in plain PyTorch; both run anywhere.
"""

from ossia.kernels.lora_linear.fused import Layer, lora_linears
from ossia.kernels.lora_linear.reference import lora_linear as reference

__all__ = ["Layer", "lora_linears", "reference"]
