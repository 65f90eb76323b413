"""Decoding attention on Triton: all query heads of a key-value head at once, long sequences cut into splits.

Letters as in the package. In kernels: ROWS query heads of a tile (those of a key-value head, up to a power of two),
KEYS positions of a tile, all in one page. Shares are powers of two, not of e.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.paged_attention.reference import Pages
from ossia.kernels.sizes import ceil_div, power_of_two

_HEADS = 16
_KEYS = 64
_PROGRAMS = 512  # about four to each of an H100's 132 processors
_SPLITS = 32


@triton.jit
def _slot(table, place, position, T, WINDOW: tl.constexpr, G: tl.constexpr):
    """Page and row of a position."""
    at = position % WINDOW if WINDOW > 0 else position
    return tl.load(table + place * T + at // G).to(tl.int64), at % G


@triton.jit
def _append(
    qkv, cos, sin, q, k, v, table, place, position, T,
    N: tl.constexpr, M: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    WINDOW: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.load(position + b)
    page, row = _slot(table, tl.load(place + b), at, T, WINDOW, G)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < HALF
    c = tl.load(cos + at * HALF + column, mask=known, other=0.0)
    s = tl.load(sin + at * HALF + column, mask=known, other=0.0)
    from_ = qkv + (b * (N + 2 * M) + head) * (2 * HALF) + column
    real = known & (head < N + 2 * M)
    first = tl.load(from_, mask=real, other=0.0)
    second = tl.load(from_ + HALF, mask=real, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    left, right = (x * c - y * s).to(first.dtype), (y * c + x * s).to(first.dtype)
    to = q + (b * N + head) * (2 * HALF) + column
    tl.store(to, left, mask=known & (head < N))
    tl.store(to + HALF, right, mask=known & (head < N))
    is_key = known & (head >= N) & (head < N + M)
    to = ((page * M + head - N) * G + row) * (2 * HALF) + column
    tl.store(k + to, left, mask=is_key)
    tl.store(k + to + HALF, right, mask=is_key)
    is_value = known & (head >= N + M) & (head < N + 2 * M)
    to -= M * G * 2 * HALF
    tl.store(v + to, first, mask=is_value)
    tl.store(v + to + HALF, second, mask=is_value)


def append(
    qkv_BHD: Tensor, cos_LD2: Tensor, sin_LD2: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor
) -> Tensor:
    """As `reference.append`; `qkv_BHD` and the tables contiguous."""
    _, kv_heads, size, head = pages.k.shape
    batch, heads = len(qkv_BHD), qkv_BHD.shape[1] - 2 * kv_heads
    q_BND = torch.empty((batch, heads, head), dtype=qkv_BHD.dtype, device=qkv_BHD.device)
    _append[(batch, ceil_div(qkv_BHD.shape[1], _HEADS))](
        qkv_BHD.contiguous(), cos_LD2, sin_LD2, q_BND, pages.k, pages.v, pages.table, place_B, position_B,
        pages.table.shape[1],
        N=heads, M=kv_heads, HALF=head // 2, COLUMNS=power_of_two(head // 2), HEADS=_HEADS, WINDOW=pages.window or 0,
        G=size, num_warps=1,
    )  # fmt: skip
    return q_BND


@triton.jit
def _attend(
    q, k, v, table, place, position, sinks, out, sums, tops, totals, T, scale,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    G: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    b, m, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    each: tl.constexpr = N // M
    seen = tl.load(position + b).to(tl.int32) + 1
    if WINDOW > 0:
        seen = tl.minimum(seen, WINDOW)
    # Whole tiles of keys, the same number to every split but the last.
    part = (seen + KEYS * SPLITS - 1) // (KEYS * SPLITS) * KEYS
    start = split * part
    end = tl.minimum(start + part, seen)
    row = tl.arange(0, ROWS)
    head = m * each + row
    real = row < each
    column = tl.arange(0, D)
    q_RD = tl.load(q + (b * N + head)[:, None] * D + column[None, :], mask=real[:, None], other=0.0)
    if SPLITS == 1:
        # The softmax starts with the sink in it: it is the first maximum, of share 1, and has added nothing.
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        # Finite, since an empty split would subtract it from itself.
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    sum_RD = tl.zeros((ROWS, D), tl.float32)
    pages_of = table + tl.load(place + b) * T
    for at in range(start, end, KEYS):
        page = tl.load(pages_of + at // G).to(tl.int64)
        key = at + tl.arange(0, KEYS)
        inside = key < end
        tile = ((page * M + m) * G + at % G + tl.arange(0, KEYS))[:, None] * D + column[None, :]
        k_KD = tl.load(k + tile, mask=inside[:, None], other=0.0)
        v_KD = tl.load(v + tile, mask=inside[:, None], other=0.0)
        logit = tl.dot(q_RD, tl.trans(k_KD), input_precision="ieee") * scale
        logit = tl.where(inside[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        share = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(share, 1)
        sum_RD = tl.dot(share.to(v_KD.dtype), v_KD, sum_RD * shrink[:, None], input_precision="ieee")
        top = higher
    if SPLITS == 1:
        to = out + (b * N + head)[:, None] * D + column[None, :]
        tl.store(to, (sum_RD / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    else:
        entry = (b * N + head) * SPLITS + split
        tl.store(sums + entry[:, None] * D + column[None, :], sum_RD, mask=real[:, None])
        tl.store(tops + entry, top, mask=real)
        tl.store(totals + entry, total, mask=real)


@triton.jit
def _combine(sums, tops, totals, sinks, out, N: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, D)
    top = tl.load(tops + entry * SPLITS + split)
    sink = tl.load(sinks + entry % N).to(tl.float32) * 1.4426950408889634
    highest = tl.maximum(tl.max(top, 0), sink)
    share = tl.exp2(top - highest)
    total = tl.sum(tl.load(totals + entry * SPLITS + split) * share, 0) + tl.exp2(sink - highest)
    part = tl.load(sums + (entry * SPLITS + split)[:, None] * D + column[None, :])
    value = tl.sum(part * share[:, None], 0) / total
    tl.store(out + entry * D + column, value.to(out.dtype.element_ty))


def attend(q_BND: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor, sinks_N: Tensor, scale: float) -> Tensor:
    """As `reference.attend`; q contiguous, D a power of two from 16 on, pages of 16 positions or a multiple of 64."""
    _, kv_heads, rows, head = pages.k.shape
    batch, heads, _ = q_BND.shape
    splits = _splits(batch * kv_heads, pages)
    out_BND = torch.empty_like(q_BND)
    count = batch * heads * splits if splits > 1 else 0
    sums, tops, totals = (
        torch.empty(size, dtype=torch.float32, device=q_BND.device) for size in (count * head, count, count)
    )
    _attend[(batch, kv_heads, splits)](
        q_BND, pages.k, pages.v, pages.table, place_B, position_B, sinks_N, out_BND, sums, tops, totals,
        pages.table.shape[1], scale * math.log2(math.e),
        N=heads, M=kv_heads, D=head, ROWS=max(16, power_of_two(heads // kv_heads)), KEYS=min(rows, _KEYS),
        WINDOW=pages.window or 0, G=rows, SPLITS=splits, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine[(batch * heads,)](sums, tops, totals, sinks_N, out_BND, N=heads, D=head, SPLITS=splits, num_warps=2)
    return out_BND


def _splits(programs: int, pages: Pages) -> int:
    """How many programs share a sequence's keys: enough to fill a GPU, one for the few of a window."""
    if pages.window is not None and pages.window <= 2 * _KEYS:
        return 1
    longest = ceil_div(pages.table.shape[1] * pages.k.shape[2], _KEYS)
    return power_of_two(max(1, min(_SPLITS, _PROGRAMS // programs, longest)) + 1) // 2
