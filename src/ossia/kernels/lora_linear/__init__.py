"""A frozen linear layer with a low-rank adapter: `x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`.

`lora_linear(x, weight_OI, bias_O, a_rI, b_Or, scale)`, gradients to x, A and B. The sum rides in the epilogue of the
second thin product, forward and backward, so no pass over the outputs is spent on it; A and B are rounded to x's dtype
for the products and get their gradients in float32. `reference` is plain PyTorch; both run anywhere.
"""

from ossia.kernels.lora_linear.fused import lora_linear
from ossia.kernels.lora_linear.reference import lora_linear as reference

__all__ = ["lora_linear", "reference"]
