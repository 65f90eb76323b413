"""A linear layer and its adapter as one differentiable step. T rows, I inputs, O outputs, r rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, scale: float
) -> Tensor:
    """[..., O] in x's dtype.

    Args:
        x: [..., I], bfloat16 or float32.
        weight_OI, bias_O: frozen, x's dtype.
        a_rI, b_Or: float32 or x's dtype; their gradients have their dtype.
    """
    return _LoraLinear.apply(x, weight_OI, bias_O, a_rI, b_Or, scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_TI = x.reshape(-1, x.shape[-1])
            u_Tr = x_TI @ a_rI.to(x.dtype).T
            out_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(u_Tr, b_Or.to(x.dtype).T, alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x_TI, weight_OI, a_rI, b_Or, u_Tr)
        return out_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a_rI, b_Or, u_Tr = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, weight_OI.shape[0])
        v_Tr = (grad_TO @ b_Or.to(grad_TO.dtype)).mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad_TO @ weight_OI).addmm_(v_Tr, a_rI.to(grad_TO.dtype)).view(*grads[0].shape[:-1], -1)
        d_a = _product(v_Tr.T, x_TI).to(a_rI.dtype) if ctx.needs_input_grad[3] else None
        d_b = _product(grad_TO.T, u_Tr).mul_(ctx.scale).to(b_Or.dtype) if ctx.needs_input_grad[4] else None
        return d_x, None, None, d_a, d_b, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32; a GPU's product of bfloat16 accumulates so, and need not round its result."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
