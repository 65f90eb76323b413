"""Routing in one kernel each way. T tokens, H hidden, E experts, K of them chosen."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.sizes import ceil_div, power_of_two

# Of tokens and columns a tile, the fastest for 32 experts on an H100 of seven tried.
_FORWARD = {"BT": 64, "BH": 128, "num_warps": 4}
# With 128 experts that tile would take 244 KB of shared memory, which no GPU has.
_FORWARD_OF_MANY = {"BT": 32, "BH": 64, "num_warps": 8}
_FEW = 64
_EXPERTS_OF_FEW = 2
_BACKWARD = {"BT": 32, "BH": 128, "num_warps": 4}


def tile_for(experts: int) -> dict[str, int]:
    """The forward kernel's tile and warps."""
    return _FORWARD if experts <= 32 else _FORWARD_OF_MANY


@triton.jit
def _forward(
    hidden,
    router,
    bias,
    index,
    weight,
    T,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,  # E and K, up to a power of two
    KP: tl.constexpr,
    EXACT: tl.constexpr,  # x is bfloat16: tensor cores lose nothing
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    expert = tl.arange(0, EP)
    logits = tl.zeros((BT, EP), tl.float32)
    for start in range(0, H, BH):
        at = start + tl.arange(0, BH)
        some = (token < T)[:, None] & (at < H)[None, :]
        x = tl.load(hidden + token[:, None] * H + at[None, :], mask=some, other=0.0)
        some = (at < H)[:, None] & (expert < E)[None, :]
        w = tl.load(router + expert[None, :] * H + at[:, None], mask=some, other=0.0).to(tl.float32)
        if EXACT:
            # Three bfloat16 parts hold all 24 bits of w, and each product with x is exact in float32.
            high = w.to(tl.bfloat16)
            rest = w - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            logits = tl.dot(x, high, logits)
            logits = tl.dot(x, middle, logits)
            logits = tl.dot(x, low, logits)
        else:
            logits = tl.dot(x.to(tl.float32), w, logits, input_precision="ieee")
    logits += tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    _choose(logits, index, weight, token, T, E, K, EP, KP)


@triton.jit
def _logits_of_few(hidden, router, bias, logits, H, E: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr):
    """Some experts of one token a program, and no tensor cores: their tile would leave all but one processor idle."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros((BE, BH), tl.float32)
    for start in range(0, H, BH):
        at = start + tl.arange(0, BH)
        x = tl.load(hidden + token * H + at, mask=at < H, other=0.0).to(tl.float32)
        some = (expert < E)[:, None] & (at < H)[None, :]
        w = tl.load(router + expert[:, None] * H + at[None, :], mask=some, other=0.0).to(tl.float32)
        total += w * x[None, :]
    value = tl.sum(total, 1) + tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    tl.store(logits + token * E + expert, value, mask=expert < E)


@triton.jit
def _choose_of_few(
    logits, index, weight, T, E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    expert = tl.arange(0, EP)
    some = (expert < E)[None, :] & (token < T)[:, None]
    of_token = tl.load(logits + token[:, None] * E + expert[None, :], mask=some, other=0.0)
    _choose(of_token, index, weight, token, T, E, K, EP, KP)


@triton.jit
def _choose(logits, index, weight, token, T, E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr):
    """Write experts and weights of tokens with logits [tokens, EP]."""
    expert = tl.arange(0, EP)
    rank = tl.where(logits != logits, float("inf"), logits)
    free = (expert < E)[None, :] & (token >= 0)[:, None]
    slot = tl.arange(0, KP)
    values = tl.full((token.shape[0], KP), float("-inf"), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(tl.where(free, rank, float("-inf")), 1)
        chosen = tl.min(tl.where(free & (rank == best[:, None]), expert[None, :], EP), 1)
        taken = expert[None, :] == chosen[:, None]
        value = tl.sum(tl.where(taken, logits, 0.0), 1)
        values = tl.where((slot == k)[None, :], value[:, None], values)
        free = free & (taken == 0)
        tl.store(index + token * K + k, chosen, mask=token < T)
    values = tl.exp(values - tl.max(values, 1)[:, None])
    values /= tl.sum(values, 1)[:, None]
    some = (token < T)[:, None] & (slot < K)[None, :]
    tl.store(weight + token[:, None] * K + slot[None, :], values, mask=some)


@triton.jit
def _backward(
    index, weight, grad, beside, router, out, T, H, K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr
):  # grad of weight, out of hidden, of which beside is what comes from elsewhere
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    at = tl.program_id(1) * BH + tl.arange(0, BH)
    real = token < T
    some = real[:, None] & (at < H)[None, :]
    mean = tl.zeros((BT,), tl.float32)
    for k in tl.static_range(K):
        w = tl.load(weight + token * K + k, mask=real, other=0.0)
        mean += w * tl.load(grad + token * K + k, mask=real, other=0.0)
    total = tl.zeros((BT, BH), tl.float32)
    for k in tl.static_range(K):
        w = tl.load(weight + token * K + k, mask=real, other=0.0)
        of_logit = w * (tl.load(grad + token * K + k, mask=real, other=0.0) - mean)
        chosen = tl.load(index + token * K + k, mask=real, other=0)
        row = tl.load(router + chosen[:, None] * H + at[None, :], mask=some, other=0.0).to(tl.float32)
        total += of_logit[:, None] * row
    if beside is not None:
        total += tl.load(beside + token[:, None] * H + at[None, :], mask=some, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * H + at[None, :], total, mask=some)


def route(hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.route`."""
    return _Route.apply(hidden_TH, weight_EH.detach(), bias_E.detach(), top_k)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, router_EH: Tensor, bias_E: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        length, experts = hidden_TH.shape[0], router_EH.shape[0]
        router_EH = router_EH.contiguous()
        index_TK = torch.empty((length, top_k), dtype=torch.int64, device=hidden_TH.device)
        weight_TK = torch.empty((length, top_k), dtype=torch.float32, device=hidden_TH.device)
        tensors = (hidden_TH.contiguous(), router_EH, bias_E.contiguous(), index_TK, weight_TK)
        sizes = {"E": experts, "K": top_k, "EP": max(16, power_of_two(experts)), "KP": power_of_two(top_k)}
        if 0 < length <= _FEW:
            logits_TE = torch.empty((length, experts), dtype=torch.float32, device=hidden_TH.device)
            _logits_of_few[(length, ceil_div(experts, _EXPERTS_OF_FEW))](
                *tensors[:3], logits_TE, hidden_TH.shape[1], E=experts, BE=_EXPERTS_OF_FEW, BH=1024, num_warps=4
            )
            _choose_of_few[(length,)](logits_TE, index_TK, weight_TK, length, **sizes, num_warps=1)
        elif length:
            tile = tile_for(experts)
            _forward[(ceil_div(length, tile["BT"]),)](
                *tensors,
                *hidden_TH.shape,
                **sizes,
                # Triton's interpreter cannot multiply bfloat16.
                EXACT=hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16,
                **tile,
            )
        ctx.dtype = hidden_TH.dtype
        ctx.save_for_backward(index_TK, weight_TK, router_EH)
        ctx.mark_non_differentiable(index_TK)
        ctx.set_materialize_grads(False)
        return index_TK, weight_TK, hidden_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, grad_TK, beside_TH = grads
        if grad_TK is None:
            return beside_TH, None, None, None
        index_TK, weight_TK, router_EH = ctx.saved_tensors
        (length, top_k), size = index_TK.shape, router_EH.shape[1]
        grad_TH = torch.empty((length, size), dtype=ctx.dtype, device=index_TK.device)
        if length:
            grid = (ceil_div(length, _BACKWARD["BT"]), ceil_div(size, _BACKWARD["BH"]))
            beside_TH = None if beside_TH is None else beside_TH.contiguous()
            gradients = (grad_TK.contiguous(), beside_TH)
            _backward[grid](index_TK, weight_TK, *gradients, router_EH, grad_TH, length, size, K=top_k, **_BACKWARD)
        return grad_TH, None, None, None
