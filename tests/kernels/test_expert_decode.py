"""Experts of few tokens against float64: Triton, interpreted in float32 or compiled in bfloat16, and the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ossia.kernels import expert_mlp
from ossia.kernels.expert_decode import expert_decode
from ossia.kernels.expert_mlp import Adapter, Frozen
from ossia.kernels.mxfp4 import dequantize, quantize

pytestmark = pytest.mark.usefixtures("poison")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}


@pytest.fixture(params=["reference", "triton"])
def blocks(request):
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return request.param == "triton"


def case(tokens, top_k, experts, hidden, inner, rank, device, dtype, one_expert=False, spread=1.0):
    """Inputs of both, and the answer in float64."""
    draw = torch.Generator().manual_seed(tokens * 100 + rank)
    randn = partial(torch.randn, generator=draw)
    x, residual = (randn(tokens, hidden).to(device, dtype) for _ in range(2))
    index = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)])
    if one_expert:
        index[:, 0], index[:, 1:] = 1, 0
    weight = randn(tokens, top_k).softmax(-1).to(device)
    frozen, pairs, exact = [], [], []
    for inputs, outputs in ((hidden, 2 * inner), (inner, hidden)):
        weights = randn(experts, outputs, inputs) * inputs**-0.5 * spread
        weights[:, 0] *= torch.logspace(-6, 1, experts)[:, None]  # scales of all sizes
        packed, scales = (part.to(device) for part in quantize(weights))
        bias = randn(experts, outputs).to(device, dtype)
        a = (randn(experts, inputs, rank) * inputs**-0.5).to(device, dtype)
        b = (randn(experts, rank, outputs) * max(rank, 1) ** -0.5).to(device, dtype)
        frozen.append(Frozen(bias, inputs, packed, scales))
        pairs.append(Adapter(a, b))
        dense = dequantize(packed, scales, torch.float32).double().transpose(1, 2)
        if rank:
            dense = dense + 1.5 * torch.bmm(a.double(), b.double())
        exact.append(Frozen(bias.double(), inputs, dense_EIO=dense))
    index = index.to(device)
    want = residual.double() + expert_mlp.reference(x.double(), index, weight.double(), *exact, 1.702, 3.0)
    return (x, index, weight, *frozen, 1.702, 3.0, residual, tuple(pairs) if rank else None, 1.5), want


def dtype_for(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("rank", [0, 1, 17])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner"),
    [(1, 4, 32, 64, 96), (1, 1, 3, 160, 32), (5, 2, 4, 96, 64), (19, 4, 5, 96, 160), (64, 4, 8, 32, 64)],
)
def test_outputs_against_float64(blocks, device, tokens, top_k, experts, hidden, inner, rank):
    dtype = dtype_for(device)
    inputs, want = case(tokens, top_k, experts, hidden, inner, rank, device, dtype)
    got = expert_decode(*inputs, blocks=blocks)
    assert (got.dtype, got.shape) == (dtype, want.shape)
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_many_rows_of_one_expert(blocks, device):
    dtype = dtype_for(device)
    inputs, want = case(50, 2, 4, 64, 64, 4, device, dtype, one_expert=True)
    got = expert_decode(*inputs, blocks=blocks)
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_every_code_with_every_scale(triton_device):
    """One input at a time: outputs are the weights themselves, exact, also of scales at both ends."""
    from ossia.kernels.expert_decode.triton import product
    from ossia.kernels.expert_mlp.triton import sort_by_expert

    dtype = dtype_for(triton_device)
    scales = torch.arange(0, 129, dtype=torch.uint8)[:, None].expand(-1, 2).contiguous()
    packed = torch.arange(256, dtype=torch.uint8).view(1, 8, 2, 16).repeat(1, 17, 1, 1)[:, :129]
    weight = Frozen(torch.zeros(1, 129, dtype=dtype), 64, packed, scales[None])
    weight = Frozen(*(x.to(triton_device) if isinstance(x, torch.Tensor) else x for x in weight))
    x = torch.eye(64, dtype=dtype, device=triton_device)
    order = sort_by_expert(torch.zeros(64, 1, dtype=torch.long, device=triton_device), 1)
    got = product(x, weight, order, None, None, 1)
    want = dequantize(packed[0], scales, torch.float32).T.to(triton_device, dtype)
    # Below float32's normal numbers a GPU's products may be 0.
    known = (want.abs() >= 2.0**-120) | (want == 0)
    assert torch.equal(got[known], want[known])
    assert known.float().mean() > 0.9


def test_gpt_oss_sizes(triton_device):
    if triton_device == "cpu":
        pytest.skip("takes minutes in the interpreter")
    for tokens in (1, 64):
        inputs, want = case(tokens, 2, 4, 2880, 2880, 8, triton_device, torch.bfloat16)
        got = expert_decode(*inputs, blocks=True)
        assert (got.double() - want).norm() <= 1.2e-2 * want.norm()
