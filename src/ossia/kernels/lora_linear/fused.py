"""Linear layers of one input and their adapters as one differentiable step.

T rows, I inputs, O outputs of a layer, r rank, R ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Layer(NamedTuple):
    """A frozen weight [O, I] and bias [O] in x's dtype, A [r, I] and B [O, r] in float32 or x's dtype, and a scale."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def lora_linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """[..., O] in x's dtype for each layer; gradients of A and B have their dtype.

    Args:
        x: [..., I], bfloat16 or float32.
        layers: at least one.
    """
    adapters = [tensor for layer in layers for tensor in (layer.a, layer.b)]
    frozen = [(layer.weight, layer.bias, layer.scale) for layer in layers]
    return _LoraLinears.apply(x, frozen, *adapters)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: list[tuple[Tensor, Tensor | None, float]], *ab: Tensor) -> tuple:
        ctx.frozen = frozen
        with torch.autocast(x.device.type, enabled=False):
            x_TI = x.reshape(-1, x.shape[-1])
            u_TR = x_TI @ torch.cat(ab[0::2]).to(x.dtype).T
            outs = []
            for (weight, bias, scale), b, u_Tr in zip(frozen, ab[1::2], _split(u_TR, ab), strict=True):
                out = F.linear(x_TI, weight, bias).addmm_(u_Tr, b.to(x.dtype).T, alpha=scale)
                outs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x_TI, u_TR, *ab)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_TI, u_TR, *ab = ctx.saved_tensors
        v_TR, d_x = torch.empty_like(u_TR), None
        d_ab: list[Tensor | None] = [None] * len(ab)
        parts = zip(ctx.frozen, grads, ab[1::2], _split(u_TR, ab), _split(v_TR, ab), strict=True)
        for number, ((weight, _, scale), grad, b, u_Tr, v_Tr) in enumerate(parts):
            grad_TO = grad.reshape(-1, weight.shape[0])
            torch.mul(grad_TO @ b.to(grad.dtype), scale, out=v_Tr)
            if ctx.needs_input_grad[0]:
                d_x = grad_TO @ weight if d_x is None else d_x.addmm_(grad_TO, weight)
            d_ab[2 * number + 1] = product(grad_TO.T, u_Tr).mul_(scale).to(b.dtype)
        if d_x is not None:
            d_x = d_x.addmm_(v_TR, torch.cat(ab[0::2]).to(d_x.dtype)).view(*grads[0].shape[:-1], -1)
        ranks = [a.shape[0] for a in ab[0::2]]
        d_ab[0::2] = [d.to(a.dtype) for d, a in zip(product(v_TR.T, x_TI).split(ranks), ab[0::2], strict=True)]
        return d_x, None, *d_ab


def _split(all_TR: Tensor, ab: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each layer's columns."""
    return all_TR.split([a.shape[0] for a in ab[0::2]], dim=1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """In float32; a GPU's product of bfloat16 accumulates so, and need not round its result."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
