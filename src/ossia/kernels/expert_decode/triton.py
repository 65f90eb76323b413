"""Experts of few tokens on Triton, their blocks expanded in registers.

T tokens, K experts a token, S = T·K rows sorted by expert, E experts, I inputs, O outputs, r rank, R2 r rounded up to
what a product takes. A program multiplies ROWS rows of one expert with COLS of its outputs. Two values of a row of x
are read as one integer, as two codes are one byte: one product takes the even inputs, one the odd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.expert_mlp import Adapter, Frozen
from ossia.kernels.expert_mlp.reference import Order
from ossia.kernels.expert_mlp.triton import _block_of, _dot_width, _pairs, combine, sort_by_expert
from ossia.kernels.sizes import ceil_div, power_of_two

_ROWS = 16
# Columns and blocks of 32 inputs of a tile, the fastest of 18 on an H100. Few rows have few programs, so small ones.
_FEW = {"COLS": 32, "RUN": 4, "num_warps": 2, "num_stages": 4}
_MANY = {"COLS": 128, "RUN": 8, "num_warps": 4, "num_stages": 4}


@triton.jit
def _thin(
    x, order, expert_of, a, out, scale, K: tl.constexpr, I: tl.constexpr, RANK: tl.constexpr, R2: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """`scale · x A[e]` of one row; order's rows stand for tokens where K is not 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    expert = tl.load(expert_of + slot)
    source = slot // K if K > 0 else row
    r = tl.arange(0, R2)
    total = tl.zeros((R2,), tl.float32)
    for at in range(0, I, COLS):
        i = at + tl.arange(0, COLS)
        value = tl.load(x + source * I + i, mask=i < I, other=0.0).to(tl.float32)
        mask = (i < I)[:, None] & (r < RANK)[None, :]
        part = tl.load(a + expert * I * RANK + i[:, None] * RANK + r[None, :], mask=mask, other=0.0)
        total += tl.sum(value[:, None] * part.to(tl.float32), 0)
    tl.store(out + row * R2 + r, (total * scale).to(out.dtype.element_ty))


def thin(x: Tensor, order_S: Tensor, index_TK: Tensor, a_EIr: Tensor, scale: float, top_k: int) -> Tensor:
    """[S, R2] in x's dtype, zeros behind the rank; x has rows of tokens where `top_k` is not 0, else sorted ones."""
    _, inputs, rank = a_EIr.shape
    width = _dot_width(rank)
    out = torch.empty((len(order_S), width), dtype=x.dtype, device=x.device)
    columns = min(power_of_two(inputs), max(64, 16384 // width))
    _thin[(len(order_S),)](
        x, order_S, index_TK, a_EIr, out, scale, K=top_k, I=inputs, RANK=rank, R2=width, COLS=columns, num_warps=8
    )
    return out


@triton.jit
def _values(bits, power, kind: tl.constexpr):
    """What codes stand for whose sign is the highest bit of an int32 and whose other three are the end of a float32's
    exponent and the start of its fraction, times a power of two that makes up for the exponent's bias."""
    return ((bits & -2118123520).to(tl.float32, bitcast=True) * power).to(kind)  # 0x81C00000


def _two_bytes(bytes_: str, power: str, low: str, high: str) -> str:
    """Instructions for two bytes, spread over the halves of a register: `low` and `high` get their codes as pairs of
    bfloat16, times those of `power`."""
    return "".join(
        f"shl.b32 code, {bytes_}, {exponent};\nand.b32 code, code, 0x01C001C0;\n"
        f"shl.b32 sign, {bytes_}, {top};\nlop3.b32 code, sign, 0x80008000, code, 0xEA;\n"
        f"fma.rn.bf16x2 {out}, code, {power}, zero;\n"
        for out, exponent, top in ((low, 6, 12), (high, 2, 8))
    )


# Eight codes of four bytes, times powers of two that have four bfloat16 in $5 and $6: low codes to $0 and $1, high ones
# to $2 and $3. A third fewer instructions than in the language, which has no pairs of bfloat16.
_EXPAND = tl.constexpr(
    "{\n.reg .b32 first, second, code, sign, zero;\nmov.b32 zero, 0x80008000;\n"
    "prmt.b32 first, $4, 0, 0x4140;\nprmt.b32 second, $4, 0, 0x4342;\n"
    f"{_two_bytes('first', '$5', '$0', '$2')}{_two_bytes('second', '$6', '$1', '$3')}}}"
)


@triton.jit
def _product(
    x, order, offsets, blocks, scales, bias, thin_rows, b, out, alpha, limit,
    K: tl.constexpr, I: tl.constexpr, O: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, RANK: tl.constexpr,
    R2: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr, BITS: tl.constexpr, half: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    expert, first, end = _block_of(offsets, tl.program_id(0), E, E2, ROWS)
    if expert >= E:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < end
    source = tl.load(order + row, mask=inside, other=0) // K if K > 0 else row
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = column < O
    kind: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = I // 32
    block_row = (expert.to(tl.int64) * O + column) * WIDTH
    byte, run = tl.arange(0, RUN * 16), tl.arange(0, RUN)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    # The pipeline moves no loads as narrow as these, so they run ahead by hand.
    at_scale = scales + block_row[None, :] + run[:, None]
    exponent = tl.load(at_scale, mask=(run < WIDTH)[:, None] & known[None, :], other=0)
    for at in range(0, WIDTH, RUN):
        at_byte = at * 16 + byte
        mask = (at_byte < WIDTH * 16)[:, None] & known[None, :]
        code = tl.load(blocks + (block_row * 16)[None, :] + at_byte[:, None], mask=mask, other=0)
        mask = inside[:, None] & (at_byte < WIDTH * 16)[None, :]
        pair = tl.load(x + source[:, None] * (I // 2) + at_byte[None, :], mask=mask, other=0)
        ahead = at + RUN + run
        # A scale byte s is 2^(s - 127), and 2^126 is the bias: 2^(s - 1).
        if ASM:
            power = ((exponent.to(tl.int16) + 126) << 7).to(tl.bfloat16, bitcast=True)[:, None, :]
            exponent = tl.load(at_scale + at + RUN, mask=(ahead < WIDTH)[:, None] & known[None, :], other=0)
            power = tl.reshape(tl.broadcast_to(power, (RUN, 16, COLS)), (RUN * 16, COLS))
            low, high = tl.inline_asm_elementwise(
                _EXPAND, "=r,=r,=r,=r,r,r,r", [code, power], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            power = ((exponent.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)[:, None, :]
            exponent = tl.load(at_scale + at + RUN, mask=(ahead < WIDTH)[:, None] & known[None, :], other=0)
            # As a signed byte, whose sign, that of the high code, fills all bits above it.
            code = tl.reshape(code.to(tl.int8, bitcast=True).to(tl.int32), (RUN, 16, COLS))
            low = tl.reshape(_values((code << 28) >> 6, power, kind), (RUN * 16, COLS))
            high = tl.reshape(_values(code << 18, power, kind), (RUN * 16, COLS))
        acc = tl.dot(pair.to(half).to(kind, bitcast=True), low, acc, input_precision="ieee")
        acc = tl.dot((pair >> BITS).to(half).to(kind, bitcast=True), high, acc, input_precision="ieee")
    if RANK > 0:
        r = tl.arange(0, R2)
        u = tl.load(thin_rows + row[:, None] * R2 + r[None, :], mask=inside[:, None], other=0.0)
        at_b = b + (expert.to(tl.int64) * RANK + r[:, None]) * O + column[None, :]
        factor = tl.load(at_b, mask=(r < RANK)[:, None] & known[None, :], other=0.0)
        acc = tl.dot(u, factor.to(kind), acc, input_precision="ieee")
    if ACT:
        acc += tl.load(bias + expert * O + column, mask=known, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(acc, (ROWS, COLS // 2, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        act = (up + 1) * gate * tl.sigmoid(alpha * gate)
        column = tl.program_id(1) * (COLS // 2) + tl.arange(0, COLS // 2)
        mask = inside[:, None] & (column < O // 2)[None, :]
        tl.store(out + row[:, None] * (O // 2) + column[None, :], act.to(kind), mask=mask)
    else:
        tl.store(out + row[:, None] * O + column[None, :], acc.to(kind), mask=inside[:, None] & known[None, :])


def product(
    x: Tensor, weight: Frozen, order: Order, adapter: Adapter | None, thin_SR: Tensor | None, top_k: int = 0,
    act: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Sorted rows through a projection, without its bias; with `act`, its alpha and limit, through bias and SwiGLU too.

    Args:
        x: rows of tokens where `top_k` is not 0, else sorted ones; contiguous.
        weight: in MXFP4.
        order: of the rows.
        adapter: whose B is added to what `thin` made.
        thin_SR: from `thin`.
        top_k: experts a token.
        act: alpha and limit.
    """
    blocks, scales, bias = weight.blocks, weight.scales, weight.bias_EO
    assert blocks is not None
    experts, outputs = bias.shape
    rows = len(order.order_S)
    out = torch.empty((rows, outputs // 2 if act else outputs), dtype=x.dtype, device=x.device)
    tile = _FEW if rows <= _ROWS else _MANY
    grid = (min(rows, ceil_div(rows, _ROWS) + experts), ceil_div(outputs, tile["COLS"]))
    pairs, options = _pairs(x.dtype)
    rank = 0 if adapter is None else adapter.b_ErO.shape[1]
    alpha, limit = act or (0.0, 0.0)
    _product[grid](
        x.view(pairs), order.order_S, order.offsets_E, blocks, scales, bias, out if thin_SR is None else thin_SR,
        out if adapter is None else adapter.b_ErO, out, alpha, limit,
        K=top_k, I=weight.inputs, O=outputs, E=experts, E2=power_of_two(experts), RANK=rank, R2=_dot_width(rank),
        ACT=act is not None, ASM=x.is_cuda and x.dtype == torch.bfloat16, ROWS=_ROWS, **options, **tile,
    )  # fmt: skip
    return out


def expert_decode(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Frozen,
    down: Frozen,
    alpha: float,
    limit: float,
    residual_TH: Tensor,
    adapters: tuple[Adapter, Adapter] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """As `reference.expert_decode`; everything contiguous."""
    order, top_k = sort_by_expert(index_TK, len(gate_up.bias_EO)), index_TK.shape[1]
    first, second = adapters or (None, None)
    u = None if first is None else thin(hidden_TH, order.order_S, index_TK, first.a_EIr, scale, top_k)
    act_SI = product(hidden_TH, gate_up, order, first, u, top_k, (alpha, limit))
    u = None if second is None else thin(act_SI, order.order_S, index_TK, second.a_EIr, scale, 0)
    out_SH = product(act_SI, down, order, second, u)
    return combine(out_SH, order.position_TK, weight_TK, index_TK, down.bias_EO, residual_TH)
