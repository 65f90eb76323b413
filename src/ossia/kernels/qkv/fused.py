"""Queries, keys and values as one differentiable step. Letters as in the package; T = B · S, R all adapters' ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.kernels.lora_linear.fused import product
from ossia.kernels.qkv.reference import Adapter
from ossia.kernels.rope.triton import turn


def qkv(
    x: Tensor,
    weight_XI: Tensor,
    bias_X: Tensor | None,
    adapters: Sequence[Adapter],
    cos_BSD2: Tensor,
    sin_BSD2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.qkv`: views of one tensor [B, S, N + 2M, D]. Gradients of A and B have their dtype."""
    tensors = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
    scales = [adapter.scale for adapter in adapters]
    return _Qkv.apply(x, weight_XI, bias_X, cos_BSD2, sin_BSD2, scales, *tensors)


class _Qkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_XI: Tensor, bias_X: Tensor | None, cos: Tensor, sin: Tensor, scales: list[float],
        *ab: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, length, inputs = x.shape
        x_TI, shapes = x.reshape(-1, inputs), [tensor.shape for tensor in ab]
        with torch.autocast(x.device.type, enabled=False):
            a_RI = torch.cat(ab[0::2]).to(x.dtype)
            b_XR = x.new_zeros(weight_XI.shape[0], a_RI.shape[0])
            for b, scale, own in zip(ab[1::2], scales, _blocks(b_XR, shapes), strict=True):
                own.copy_(b * scale)
            u_TR = x_TI @ a_RI.T
            out_TX = F.linear(x_TI, weight_XI, bias_X).addmm_(u_TR, b_XR.T)
        out = out_TX.view(batch, length, -1, 2 * cos.shape[-1])
        values = shapes[-1][0] // out.shape[-1]
        turned = out[:, :, :-values]
        turn(turned, cos, sin, turned)
        ctx.frozen, ctx.scales = weight_XI, scales
        ctx.kinds = [tensor.dtype for tensor in ab]
        ctx.shapes = shapes
        ctx.save_for_backward(x_TI, u_TR, a_RI, b_XR, cos, sin)
        return out[:, :, : -2 * values], out[:, :, -2 * values : -values], out[:, :, -values:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_TI, u_TR, a_RI, b_XR, cos, sin = ctx.saved_tensors
        d_q, d_k, d_v = grads
        batch, length, values, size = d_v.shape
        grad = d_v.new_empty(batch, length, b_XR.shape[0] // size, size)
        turn(d_q, cos, sin, grad[:, :, : -2 * values], back=True)
        turn(d_k, cos, sin, grad[:, :, -2 * values : -values], back=True)
        grad[:, :, -values:] = d_v
        grad_TX = grad.view(len(x_TI), -1)
        v_TR = grad_TX @ b_XR
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad_TX @ ctx.frozen).addmm_(v_TR, a_RI).view(batch, length, -1)
        d_ab: list[Tensor | None] = [None] * len(ctx.kinds)
        d_a = product(v_TR.T, x_TI).split([shape[0] for shape in ctx.shapes[0::2]])
        d_ab[0::2] = [d.to(kind) for d, kind in zip(d_a, ctx.kinds[0::2], strict=True)]
        d_b = _blocks(product(grad_TX.T, u_TR), ctx.shapes)
        d_ab[1::2] = [(d * scale).to(kind) for d, scale, kind in zip(d_b, ctx.scales, ctx.kinds[1::2], strict=True)]
        return d_x, *[None] * 5, *d_ab


def _blocks(matrix_XR: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    """Each adapter's rows and columns of a matrix, from the shapes of A, B, A, B, …"""
    rows = [shape[0] for shape in shapes[1::2]]
    ranks = [shape[0] for shape in shapes[0::2]]
    for row, rank, end, last in zip(rows, ranks, accumulate(rows), accumulate(ranks), strict=True):
        yield matrix_XR[end - row : end, last - rank : last]
