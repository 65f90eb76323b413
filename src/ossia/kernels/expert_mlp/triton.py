"""The memory-bound parts of the experts' MLP, each one pass over its rows, with the adapters' thin products inside.

T tokens, K experts a token, S = T·K rows sorted by expert, E experts, I inputs, O outputs, M intermediate, r rank,
R rank rounded up to 16. A "tail" is the R columns behind a row's own, in the same tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.expert_mlp.frozen import padded
from ossia.kernels.expert_mlp.reference import Order
from ossia.kernels.sizes import ceil_div, power_of_two

# Rows and columns of a tile, and how many warps share it: near the fastest of some thirty each on an H100.
_GATHER = {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2}
_SWIGLU = {"ROWS": 64, "COLS": 64, "num_warps": 8, "num_stages": 1}
_SWIGLU_BACKWARD = {"ROWS": 32, "COLS": 64, "num_warps": 4, "num_stages": 3}
# So few registers that some are spilled, and more blocks run side by side.
_SWIGLU_COLUMNS = {"ROWS": 32, "COLS": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
_COLUMNS_RANK = 16
"""Up to this rank the columns' shares of the thin products fit where rows lay that are gone by then."""
_FINISH = {"ROWS": 64, "num_warps": 4}
_OUTER = {"ROWS": 64, "COLS": 128, "num_warps": 4, "num_stages": 2}


def _dot_width(rank: int) -> int:
    return max(16, power_of_two(rank))


def _grid(rows: int, experts: int, tile: dict[str, int]) -> tuple[int]:
    """At most so many blocks of rows, none of which holds two experts."""
    return (ceil_div(rows, tile["ROWS"]) + experts,)


@triton.jit
def _block_of(offsets, number, E: tl.constexpr, E2: tl.constexpr, ROWS: tl.constexpr):
    """The expert of a block of rows, its first row and its expert's end; an expert of E or more means no such block."""
    e = tl.arange(0, E2)
    end = tl.load(offsets + e, mask=e < E, other=0)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = tl.where(e < E, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(blocks, 0)
    expert = tl.sum((last <= number).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (number - last + blocks) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _store_tail(acc, scale, rows, inside, out, out_stride, columns, thin, RANK: tl.constexpr, R: tl.constexpr,
                R2: tl.constexpr):  # fmt: skip
    """Columns from RANK to R are zeros, since the accumulator's are."""
    r = tl.arange(0, R2)
    value = (acc * scale).to(thin.dtype.element_ty)
    keep = inside[:, None] & (r < R)[None, :]
    tl.store(out + rows[:, None] * out_stride + columns + r[None, :], value, mask=keep)
    tl.store(thin + rows[:, None] * R + r[None, :], value, mask=keep)


@triton.jit
def _sort_kernel(index, order, position, offsets, count, span, BLOCK: tl.constexpr):
    expert, part = tl.program_id(0), tl.program_id(1)
    first = part * span
    before = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, count, BLOCK):
        row = at + tl.arange(0, BLOCK)
        other = tl.load(index + row, mask=row < count, other=1 << 30)
        before += ((other < expert) | ((other == expert) & (row < first))).to(tl.int32)
    place = tl.sum(before, 0)
    for at in range(first, tl.minimum(first + span, count), BLOCK):
        row = at + tl.arange(0, BLOCK)
        mine = tl.load(index + row, mask=row < count, other=1 << 30) == expert
        to = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + to, row.to(tl.int64), mask=mine)
        tl.store(position + row, to.to(tl.int64), mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    if part == tl.num_programs(1) - 1:
        tl.store(offsets + expert, place)


def sort_by_expert(index_TK: Tensor, experts: int) -> Order:
    """As `reference.sort_by_expert`, in one launch: each expert and part of the rows counts what lies before it, then
    takes its own."""
    order_S = torch.empty(index_TK.numel(), dtype=torch.int64, device=index_TK.device)
    position_TK = torch.empty_like(index_TK, memory_format=torch.contiguous_format)
    offsets_E = torch.empty(experts, dtype=torch.int32, device=index_TK.device)
    block = max(64, min(4096, power_of_two(len(order_S))))
    blocks = ceil_div(len(order_S), block)
    parts = max(1, min(8, blocks))
    _sort_kernel[(experts, parts)](
        index_TK.contiguous(), order_S, position_TK, offsets_E, len(order_S), ceil_div(blocks, parts) * block,
        BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return Order(order_S, position_TK, offsets_E)


@triton.jit
def _adapter_kernel(
    wide, a, b, wide_e, wide_x, a_e, a_i, a_r, b_e, b_r, b_o,
    I: tl.constexpr, O: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, R2)
    at = tl.program_id(0) * COLS + tl.arange(0, COLS)
    to = wide + expert * wide_e
    value = tl.load(
        b + expert * b_e + at[:, None] * b_o + r[None, :] * b_r, mask=(at < O)[:, None] & (r < RANK)[None, :], other=0.0
    )
    mask = (at < O + R)[:, None] & (r < R)[None, :]
    tl.store(to + at[:, None].to(tl.int64) * wide_x + I + r[None, :], value, mask=mask)
    value = tl.load(
        a + expert * a_e + at[None, :] * a_i + r[:, None] * a_r, mask=(at < I)[None, :] & (r < RANK)[:, None], other=0.0
    )
    tl.store(
        to + (O + r[:, None]).to(tl.int64) * wide_x + at[None, :], value, mask=(at < I)[None, :] & (r < R)[:, None]
    )


def write_adapter(wide_EXY: Tensor, a_EIr: Tensor, b_ErO: Tensor) -> None:
    """As `frozen.write_adapter`, in one launch; any strides."""
    (experts, inputs, rank), outputs = a_EIr.shape, b_ErO.shape[2]
    tail = wide_EXY.shape[1] - outputs
    grid = (ceil_div(max(inputs, outputs + tail), 128), experts)
    _adapter_kernel[grid](
        wide_EXY, a_EIr, b_ErO, *wide_EXY.stride()[:2], *a_EIr.stride(), *b_ErO.stride(),
        I=inputs, O=outputs, RANK=rank, R=tail, R2=_dot_width(tail), COLS=128, num_warps=4,
    )  # fmt: skip


@triton.jit
def _gather_kernel(
    x, order, offsets, matrix, matrix_e, matrix_i, matrix_r, vector, out, thin, dots, scale, out_stride,
    I: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    R2: tl.constexpr, DOTS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = _block_of(offsets, tl.program_id(0), E, E2, ROWS)
    if expert >= E:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    source = tl.load(order + rows, mask=inside, other=0) // K
    r = tl.arange(0, R2)
    acc = tl.zeros((ROWS, R2), tl.float32)
    dot = tl.zeros((ROWS,), tl.float32)
    for at in range(0, I, COLS):
        i = at + tl.arange(0, COLS)
        mask = inside[:, None] & (i < I)[None, :]
        value = tl.load(x + source[:, None] * I + i[None, :], mask=mask, other=0.0)
        tl.store(out + rows[:, None] * out_stride + i[None, :], value, mask=mask)
        if RANK > 0:
            part = matrix + expert.to(tl.int64) * matrix_e + i[:, None] * matrix_i + r[None, :] * matrix_r
            factor = tl.load(part, mask=(i < I)[:, None] & (r < RANK)[None, :], other=0.0)
            acc = tl.dot(value, factor.to(value.dtype), acc, input_precision="ieee")
        if DOTS:
            bias = tl.load(vector + expert * I + i, mask=i < I, other=0.0).to(tl.float32)
            dot += tl.sum(value.to(tl.float32) * bias[None, :], 1)
    if RANK > 0:
        _store_tail(acc, scale, rows, inside, out, out_stride, I, thin, RANK, R, R2)
    if DOTS:
        tl.store(dots + rows, dot, mask=inside)


def gather(
    x_TI: Tensor,
    order_S: Tensor,
    offsets_E: Tensor,
    top_k: int,
    matrix_EIr: Tensor | None = None,
    scale: float = 1.0,
    vector_EI: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by expert, each with its adapter's thin product.

    Args:
        x_TI: contiguous, bfloat16 or float32.
        order_S: int64; row s is token `order[s] // top_k`.
        offsets_E: int32 end of each expert's rows.
        matrix_EIr: any strides; float32 or x's dtype.
        vector_EI: contiguous.

    Returns:
        [S, I + R] rows with the tail `scale * row @ matrix[e]`; the tail alone, [S, R]; float32 [S] `row @ vector[e]`.
        Without a matrix R is 0; without a vector the last is empty.
    """
    count, inputs, experts = len(order_S), x_TI.shape[1], len(offsets_E)
    rank = 0 if matrix_EIr is None else matrix_EIr.shape[2]
    tail = padded(rank)
    out = x_TI.new_empty(count, inputs + tail)
    thin = x_TI.new_empty(count, tail)
    dots = x_TI.new_empty(0 if vector_EI is None else count, dtype=torch.float32)
    _gather_kernel[_grid(count, experts, _GATHER)](
        x_TI, order_S, offsets_E, x_TI if matrix_EIr is None else matrix_EIr,
        *((0, 0, 0) if matrix_EIr is None else matrix_EIr.stride()), x_TI if vector_EI is None else vector_EI,
        out, thin, dots, scale, out.stride(0),
        I=inputs, K=top_k, E=experts, E2=power_of_two(experts), RANK=rank, R=tail, R2=_dot_width(rank),
        DOTS=vector_EI is not None, **_GATHER,
    )  # fmt: skip
    return out, thin, dots


def _pairs(kind: torch.dtype) -> tuple[torch.dtype, dict[str, Any]]:
    """The integer that holds a gate and its up, and how a kernel takes it apart: neighbours then lie in one thread, in
    the layout of everything else, which `tl.split` would not have."""
    if kind.itemsize == 2:
        return torch.int32, {"BITS": 16, "half": tl.int16}
    return torch.int64, {"BITS": 32, "half": tl.int32}


@triton.jit
def _apart(pair, kind: tl.constexpr, BITS: tl.constexpr, half: tl.constexpr):
    """Gate and up of integers that hold two values of `kind`, gate in the low half; float32 both."""
    gate = pair.to(half).to(kind, bitcast=True).to(tl.float32)
    return gate, (pair >> BITS).to(half).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _together(gate, up, BITS: tl.constexpr, half: tl.constexpr, whole: tl.constexpr):
    """The inverse of `_apart`, of two tensors of `kind`."""
    low = gate.to(half, bitcast=True).to(whole) & ((1 << BITS) - 1)
    return low | (up.to(half, bitcast=True).to(whole) << BITS)


@triton.jit
def _swiglu_kernel(
    gate_up, bias, offsets, matrix, out, thin, scale, alpha, limit, in_stride, out_stride,
    M: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    BITS: tl.constexpr, half: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = _block_of(offsets, tl.program_id(0), E, E2, ROWS)
    if expert >= E:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    r = tl.arange(0, R2)
    kind: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros((ROWS, R2), tl.float32)
    for at in range(0, M, COLS):
        m = at + tl.arange(0, COLS)
        mask = inside[:, None] & (m < M)[None, :]
        gate, up = _apart(
            tl.load(gate_up + rows[:, None] * in_stride + m[None, :], mask=mask, other=0), kind, BITS, half
        )
        b_gate, b_up = _apart(tl.load(bias + expert * M + m, mask=m < M, other=0), kind, BITS, half)
        gate = tl.minimum(gate + b_gate[None, :], limit)
        up = tl.minimum(tl.maximum(up + b_up[None, :], -limit), limit)
        act = ((up + 1) * gate * tl.sigmoid(alpha * gate)).to(kind)
        tl.store(out + rows[:, None] * out_stride + m[None, :], act, mask=mask)
        if RANK > 0:
            part = matrix + expert.to(tl.int64) * M * RANK + m[:, None] * RANK + r[None, :]
            factor = tl.load(part, mask=(m < M)[:, None] & (r < RANK)[None, :], other=0.0)
            acc = tl.dot(act, factor.to(kind), acc, input_precision="ieee")
    if RANK > 0:
        _store_tail(acc, scale, rows, inside, out, out_stride, M, thin, RANK, R, R2)


def swiglu(
    gate_up_SX: Tensor,
    bias_E2M: Tensor,
    offsets_E: Tensor,
    alpha: float,
    limit: float,
    matrix_EMr: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Clamped SwiGLU, [S, M + R]: `(up + 1) * gate * sigmoid(alpha * gate)` and the tail `scale * act @ matrix[e]`.

    Args:
        gate_up_SX: the first 2M columns are gate and up by turns, without bias.
        bias_E2M: contiguous.
        matrix_EMr: contiguous.
    """
    count, inner, experts = len(gate_up_SX), bias_E2M.shape[1] // 2, len(offsets_E)
    rank = 0 if matrix_EMr is None else matrix_EMr.shape[2]
    tail = padded(rank)
    out = gate_up_SX.new_empty(count, inner + tail)
    thin = gate_up_SX.new_empty(count, tail)
    pairs, options = _pairs(gate_up_SX.dtype)
    _swiglu_kernel[_grid(count, experts, _SWIGLU)](
        gate_up_SX.view(pairs), bias_E2M.view(pairs), offsets_E, gate_up_SX if matrix_EMr is None else matrix_EMr, out,
        thin, scale, alpha, limit, gate_up_SX.stride(0) // 2, out.stride(0),
        M=inner, E=experts, E2=power_of_two(experts), RANK=rank, R=tail, R2=_dot_width(rank), **options, **_SWIGLU,
    )  # fmt: skip
    return out


@triton.jit
def _gradients(pair, b_gate, b_up, back, weight_S, alpha, limit, kind: tl.constexpr, BITS: tl.constexpr,
               half: tl.constexpr):  # fmt: skip
    """Of a tile: activations, their products with `back` summed over columns (float32), gradients of gate and up."""
    gate, up = _apart(pair, kind, BITS, half)
    gate += b_gate[None, :]
    up += b_up[None, :]
    gate_on = gate <= limit
    up_on = (up <= limit) & (up >= -limit)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit) + 1
    share = tl.sigmoid(alpha * gate)
    act = up * gate * share
    dot = tl.sum(act * back, 1)
    back *= weight_S[:, None]
    d_gate = tl.where(gate_on, back * up * share * (1 + alpha * gate * (1 - share)), 0.0).to(kind)
    d_up = tl.where(up_on, back * gate * share, 0.0).to(kind)
    return act.to(kind), dot, d_gate, d_up


@triton.jit
def _swiglu_backward_kernel(
    gate_up, bias, order, offsets, shared, weight, biased, matrix_a, matrix_b, thin_a, thin_b, tail, dots, scale,
    alpha, limit, stride,
    M: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    BITS: tl.constexpr, half: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = _block_of(offsets, tl.program_id(0), E, E2, ROWS)
    if expert >= E:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    slot = tl.load(order + rows, mask=inside, other=0)
    weight_S = tl.load(weight + slot, mask=inside, other=0.0)
    r = tl.arange(0, R2)
    acc_a = tl.zeros((ROWS, R2), tl.float32)
    acc_b = tl.zeros((ROWS, R2), tl.float32)
    dot = tl.load(biased + rows, mask=inside, other=0.0)
    kind: tl.constexpr = shared.dtype.element_ty
    for at in range(0, M, COLS):
        m = at + tl.arange(0, COLS)
        mask = inside[:, None] & (m < M)[None, :]
        at_pair = gate_up + rows[:, None] * stride + m[None, :]
        pair = tl.load(at_pair, mask=mask, other=0)
        b_gate, b_up = _apart(tl.load(bias + expert * M + m, mask=m < M, other=0), kind, BITS, half)
        at_m = shared + rows[:, None] * M + m[None, :]
        back = tl.load(at_m, mask=mask, other=0.0).to(tl.float32)
        act, part_dot, d_gate, d_up = _gradients(pair, b_gate, b_up, back, weight_S, alpha, limit, kind, BITS, half)
        dot += part_dot
        tl.store(at_m, act, mask=mask)
        tl.store(at_pair, _together(d_gate, d_up, BITS, half, gate_up.dtype.element_ty), mask=mask)
        if RANK > 0:
            known = (m < M)[:, None] & (r < RANK)[None, :]
            part = matrix_a + expert.to(tl.int64) * M * RANK + m[:, None] * RANK + r[None, :]
            acc_a = tl.dot(act, tl.load(part, mask=known, other=0.0), acc_a, input_precision="ieee")
            part = matrix_b + expert.to(tl.int64) * 2 * M * RANK + m[:, None] * 2 * RANK + r[None, :]
            acc_b = tl.dot(d_gate, tl.load(part, mask=known, other=0.0), acc_b, input_precision="ieee")
            acc_b = tl.dot(d_up, tl.load(part + RANK, mask=known, other=0.0), acc_b, input_precision="ieee")
    if RANK > 0:
        value = (acc_a * scale).to(kind)
        tl.store(thin_a + rows[:, None] * R + r[None, :], value, mask=inside[:, None] & (r < R)[None, :])
        _store_tail(acc_b, scale, rows, inside, tail, 2 * stride, 2 * M, thin_b, RANK, R, R2)
    tl.store(dots + slot, dot, mask=inside)


@triton.jit
def _swiglu_columns_kernel(
    gate_up, bias, order, offsets, back, weight, matrix_a, matrix_b, thin_up, thin_down, shares, out_up, out_down,
    up_p, up_e, up_n, up_r, down_p, down_e, down_n, down_r, alpha, limit, stride, count,
    M: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr,
    BITS: tl.constexpr, half: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    expert = tl.program_id(1).to(tl.int64)
    kind: tl.constexpr = back.dtype.element_ty
    m = column * COLS + tl.arange(0, COLS)
    r = tl.arange(0, R2)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    b_gate, b_up = _apart(tl.load(bias + expert * M + m, mask=m < M, other=0), kind, BITS, half)
    known = (m < M)[:, None] & (r < RANK)[None, :]
    a = tl.load(matrix_a + (expert * M + m[:, None]) * RANK + r[None, :], mask=known, other=0.0)
    at_b = matrix_b + (expert * M + m[:, None]) * 2 * RANK + r[None, :]
    of_gate, of_up = tl.load(at_b, mask=known, other=0.0), tl.load(at_b + RANK, mask=known, other=0.0)
    sum_gate = tl.zeros((COLS, R2), tl.float32)
    sum_up = tl.zeros((COLS, R2), tl.float32)
    sum_act = tl.zeros((COLS, R2), tl.float32)
    shares += column * count * (2 * RANK + 1)
    for at in range(start + part * ROWS, end, PARTS * ROWS):
        rows = (at + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < end
        weight_S = tl.load(weight + tl.load(order + rows, mask=inside, other=0), mask=inside, other=0.0)
        mask = inside[:, None] & (m < M)[None, :]
        at_pair = gate_up + rows[:, None] * stride + m[None, :]
        pair = tl.load(at_pair, mask=mask, other=0)
        back_SM = tl.load(back + rows[:, None] * M + m[None, :], mask=mask, other=0.0).to(tl.float32)
        act, dot, d_gate, d_up = _gradients(pair, b_gate, b_up, back_SM, weight_S, alpha, limit, kind, BITS, half)
        tl.store(at_pair, _together(d_gate, d_up, BITS, half, gate_up.dtype.element_ty), mask=mask)

        of_rows = inside[:, None] & (r < RANK)[None, :]
        at_share = shares + rows[:, None] * RANK + r[None, :]
        tl.store(at_share, tl.dot(act, a, input_precision="ieee"), mask=of_rows)
        thin = tl.dot(d_gate, of_gate, input_precision="ieee")
        tl.store(at_share + count * RANK, tl.dot(d_up, of_up, thin, input_precision="ieee"), mask=of_rows)
        tl.store(shares + count * 2 * RANK + rows, dot, mask=inside)

        thin = tl.load(thin_up + rows[:, None] * R + r[None, :], mask=of_rows, other=0.0)
        sum_gate = tl.dot(tl.trans(d_gate), thin, sum_gate, input_precision="ieee")
        sum_up = tl.dot(tl.trans(d_up), thin, sum_up, input_precision="ieee")
        thin = tl.load(thin_down + rows[:, None] * R + r[None, :], mask=of_rows, other=0.0)
        thin = (thin.to(tl.float32) * weight_S[:, None]).to(kind)
        sum_act = tl.dot(tl.trans(act), thin, sum_act, input_precision="ieee")
    to = out_up + part * up_p + expert * up_e + 2 * m[:, None] * up_n + r[None, :] * up_r
    tl.store(to, sum_gate, mask=known)
    tl.store(to + up_n, sum_up, mask=known)
    to = out_down + part * down_p + expert * down_e + m[:, None] * down_n + r[None, :] * down_r
    tl.store(to, sum_act, mask=known)


@triton.jit
def _finish_kernel(
    shares, biased, order, thin_a, thin_b, tail, dots, scale, stride, columns, count, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < count
    r = tl.arange(0, R2)
    known = inside[:, None] & (r < RANK)[None, :]
    acc_a = tl.zeros((ROWS, R2), tl.float32)
    acc_b = tl.zeros((ROWS, R2), tl.float32)
    dot = tl.load(biased + rows, mask=inside, other=0.0)
    for _ in range(COLUMNS):
        at_share = shares + rows[:, None] * RANK + r[None, :]
        acc_a += tl.load(at_share, mask=known, other=0.0)
        acc_b += tl.load(at_share + count * RANK, mask=known, other=0.0)
        dot += tl.load(shares + count * 2 * RANK + rows, mask=inside, other=0.0)
        shares += count * (2 * RANK + 1)
    value = (acc_a * scale).to(thin_a.dtype.element_ty)
    tl.store(thin_a + rows[:, None] * R + r[None, :], value, mask=inside[:, None] & (r < R)[None, :])
    _store_tail(acc_b, scale, rows, inside, tail, stride, columns, thin_b, RANK, R, R2)
    tl.store(dots + tl.load(order + rows, mask=inside, other=0), dot, mask=inside)


class Outer(NamedTuple):
    """Tails [S, R] of the rows that went into both projections (`gate_up`) and of the gradients that came out
    (`down`), and float32 room of any strides for the gradients of gate_up's B [E, 2M, r] and down's A [E, M, r]."""

    gate_up_SR: Tensor
    down_SR: Tensor
    d_b_E2Mr: Tensor
    d_a_EMr: Tensor


def swiglu_backward_(
    gate_up_SX: Tensor,
    bias_E2M: Tensor,
    order_S: Tensor,
    offsets_E: Tensor,
    back_SM: Tensor,
    weight_TK: Tensor,
    biased_S: Tensor,
    alpha: float,
    limit: float,
    a_EMr: Tensor | None = None,
    b_Er2M: Tensor | None = None,
    scale: float = 1.0,
    outer_to: Outer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `swiglu`, of the experts' weights and of the adapters beside it, in place.

    Args:
        gate_up_SX: [S, 2M + R]: gate and up without bias; becomes their gradient, with the tail
            `scale * gradient @ b[e].T`.
        back_SM: contiguous: gradient of the activations before each row's weight; used up.
        weight_TK: float32 weight of each token's k-th expert, contiguous.
        biased_S: float32, what `weight_TK`'s gradient gets from the second bias.
        a_EMr: down's A, contiguous; b_Er2M: gate_up's B, contiguous.
        outer_to: where adapters train.

    Returns:
        `scale * act @ a[e]` [S, R]; the tail alone [S, R]; the gradient of `weight_TK`, `act @ back + biased`.
    """
    count, inner, experts = len(gate_up_SX), bias_E2M.shape[1] // 2, len(offsets_E)
    rank = 0 if a_EMr is None else a_EMr.shape[2]
    tail = padded(rank)
    thin_a, thin_b = gate_up_SX.new_empty(count, tail), gate_up_SX.new_empty(count, tail)
    dots_TK = torch.empty_like(weight_TK)
    # Narrow, and with a row's r values side by side, they come in few loads: there are as many of them as of the rows'.
    matrix_a, matrix_b = (
        gate_up_SX if x is None else x.to(gate_up_SX.dtype, memory_format=torch.contiguous_format).contiguous()
        for x in (a_EMr, None if b_Er2M is None else b_Er2M.transpose(1, 2))
    )
    pairs, options = _pairs(gate_up_SX.dtype)
    rows, bias = gate_up_SX.view(pairs), bias_E2M.view(pairs)
    if outer_to is not None and rank <= _COLUMNS_RANK:
        # Each program keeps to its columns, whose outer products then stay with it; of the thin products it has shares.
        columns, width = ceil_div(inner, _SWIGLU_COLUMNS["COLS"]), max(8, power_of_two(rank))
        shares = torch.empty(columns * count * (2 * rank + 1), dtype=torch.float32, device=rows.device)
        parts = _parts(count, experts)
        sums = [_sums(x, parts) for x in (outer_to.d_b_E2Mr, outer_to.d_a_EMr)]
        _swiglu_columns_kernel[(columns, experts, parts)](
            rows, bias, order_S, offsets_E, back_SM, weight_TK, matrix_a, matrix_b, outer_to.gate_up_SR,
            outer_to.down_SR, shares, *sums, *sums[0].stride(), *sums[1].stride(), alpha, limit, rows.stride(0), count,
            M=inner, PARTS=parts, RANK=rank, R=tail, R2=width, **options, **_SWIGLU_COLUMNS,
        )  # fmt: skip
        _finish_kernel[(ceil_div(count, _FINISH["ROWS"]),)](
            shares, biased_S, order_S, thin_a, thin_b, gate_up_SX, dots_TK, scale, gate_up_SX.stride(0), 2 * inner,
            count, COLUMNS=columns, RANK=rank, R=tail, R2=max(width, tail), **_FINISH,
        )  # fmt: skip
        _add_up(sums[0], outer_to.d_b_E2Mr)
        _add_up(sums[1], outer_to.d_a_EMr)
        return thin_a, thin_b, dots_TK
    _swiglu_backward_kernel[_grid(count, experts, _SWIGLU_BACKWARD)](
        rows, bias, order_S, offsets_E, back_SM, weight_TK, biased_S,
        matrix_a, matrix_b, thin_a, thin_b, gate_up_SX, dots_TK, scale, alpha, limit, rows.stride(0),
        M=inner, E=experts, E2=power_of_two(experts), RANK=rank, R=tail, R2=_dot_width(rank), **options,
        **_SWIGLU_BACKWARD,
    )  # fmt: skip
    if outer_to is not None:
        outer(outer_to.gate_up_SR, gate_up_SX, offsets_E, outer_to.d_b_E2Mr)
        outer(outer_to.down_SR, back_SM, offsets_E, outer_to.d_a_EMr, order_S, weight_TK=weight_TK)
    return thin_a, thin_b, dots_TK


@triton.jit
def _combine_kernel(
    rows, position, weight, index, bias, residual, out,
    H: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = h < H
    total = tl.zeros((COLS,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position + token * K + k)
        value = tl.load(rows + row * H + h, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            expert = tl.load(index + token * K + k)
            value += tl.load(bias + expert * H + h, mask=mask, other=0.0).to(tl.float32)
            value *= tl.load(weight + token * K + k)
        total += value
    if ADDED:
        total += tl.load(residual + token * H + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * H + h, total, mask=mask)


def combine(
    rows_SH: Tensor,
    position_TK: Tensor,
    weight_TK: Tensor | None = None,
    index_TK: Tensor | None = None,
    bias_EH: Tensor | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """[T, H]: the sum of each token's rows, or of `weight * (row + bias[e])`, and of `residual`; summed in float32.

    Args:
        rows_SH: contiguous.
        position_TK: int64 row of each token's k-th expert.
        weight_TK: float32; with it int64 `index_TK` and `bias_EH`, all contiguous.
        residual_TH: contiguous.
    """
    tokens, top_k = position_TK.shape
    width = rows_SH.shape[1]
    out = rows_SH.new_empty(tokens, width)
    columns = min(1024, power_of_two(width))
    _combine_kernel[(tokens, ceil_div(width, columns))](
        rows_SH, position_TK, rows_SH if weight_TK is None else weight_TK, rows_SH if index_TK is None else index_TK,
        rows_SH if bias_EH is None else bias_EH, rows_SH if residual_TH is None else residual_TH, out,
        H=width, K=top_k, WEIGHTED=weight_TK is not None, ADDED=residual_TH is not None, COLS=columns, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _outer_kernel(
    thin, wide, order, offsets, weight, out, wide_stride, out_p, out_e, out_n, out_r, N,
    PARTS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, WEIGHTED: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    r = tl.arange(0, R2)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    part = tl.program_id(2)
    acc = tl.zeros((R2, COLS), tl.float32)
    for at in range(start + part * ROWS, end, PARTS * ROWS):
        rows = (at + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < end
        source = rows
        if K > 0:
            source = tl.load(order + rows, mask=inside, other=0) // K
        small = tl.load(thin + rows[None, :] * R + r[:, None], mask=inside[None, :] & (r < RANK)[:, None], other=0.0)
        if WEIGHTED:
            factor = tl.load(weight + tl.load(order + rows, mask=inside, other=0), mask=inside, other=0.0)
            small = (small.to(tl.float32) * factor[None, :]).to(small.dtype)
        value = tl.load(
            wide + source[:, None] * wide_stride + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0
        )
        acc = tl.dot(small, value, acc, input_precision="ieee")
    to = out + part * out_p + expert.to(tl.int64) * out_e + r[:, None] * out_r + n[None, :] * out_n
    tl.store(to, acc, mask=(r < RANK)[:, None] & (n < N)[None, :])


def outer(
    thin_SR: Tensor,
    wide_XN: Tensor,
    offsets_E: Tensor,
    out: Tensor,
    order_S: Tensor | None = None,
    top_k: int = 0,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """For each expert the sum over its rows of `wide[row] ⊗ thin[row]`, into float32 `out` [E, N, r] of any strides.

    Args:
        thin_SR: contiguous; its first r columns count.
        wide_XN: N columns of unit stride, one row for each of S; or with `top_k` one a token, as in `gather`.
        order_S: as in `gather`; needed with either of the next.
        weight_TK: float32 factor of each row, by token and expert.
    """
    experts, width, rank = out.shape
    parts = _parts(len(thin_SR), experts)
    sums = _sums(out, parts)
    _outer_kernel[(ceil_div(width, _OUTER["COLS"]), experts, parts)](
        thin_SR, wide_XN, thin_SR if order_S is None else order_S, offsets_E,
        thin_SR if weight_TK is None else weight_TK, sums, wide_XN.stride(0), *sums.stride(), width,
        PARTS=parts, K=top_k, RANK=rank, R=thin_SR.shape[1], R2=_dot_width(rank),
        WEIGHTED=weight_TK is not None, **_OUTER,
    )  # fmt: skip
    _add_up(sums, out)
    return out


def _parts(rows: int, experts: int) -> int:
    """Parts of an expert's rows run side by side, or all would wait for the expert that has most."""
    return 4 if rows >= 512 * experts else 1


def _sums(out_ENr: Tensor, parts: int) -> Tensor:
    """Room for each part's sums, [parts, E, N, r]: `out` itself where there is one."""
    experts, width, rank = out_ENr.shape
    return out_ENr[None] if parts == 1 else out_ENr.new_empty(parts, experts, rank, width).transpose(2, 3)


def _add_up(sums_PENr: Tensor, out_ENr: Tensor) -> None:
    if len(sums_PENr) > 1:
        torch.sum(sums_PENr, 0, out=out_ENr)
