"""One new token a sequence against float64 attention over whole sequences: reference, and Triton on each device."""

from __future__ import annotations

import pytest
import torch

from ossia.kernels.attention import reference as attention
from ossia.kernels.paged_attention import Pages, fill
from ossia.kernels.rope import reference as rotary

KERNEL = "paged_attention"
pytestmark = pytest.mark.usefixtures("poison")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


def sequences(lengths, heads, kv_heads, head, dtype, device):
    draw = torch.Generator().manual_seed(len(lengths))
    made = [torch.randn(length, heads + 2 * kv_heads, head, generator=draw).to(device, dtype) for length in lengths]
    angle = torch.rand(max(lengths), head // 2, generator=draw).to(device) * 6
    return made, angle.cos() * 1.3, angle.sin() * 1.3, torch.randn(heads, generator=draw).to(device, dtype)


def pages_for(lengths, kv_heads, head, size, window, dtype, device, spare=3):
    """Pages in random order, more places than sequences, and what no one wrote is NaN."""
    longest = window or max(lengths)
    count = -(-longest // size)
    places = len(lengths) + 2
    table = torch.randperm(places * count + spare, generator=torch.Generator().manual_seed(1))[: places * count]
    shape = (places * count + spare, kv_heads, size, head)
    k, v = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    return Pages(k, v, table.view(places, count).to(device, torch.int32), window)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head", "size"),
    [
        (torch.float32, 4, 2, 16, 16),
        (torch.float32, 9, 3, 64, 64),
        (torch.bfloat16, 16, 2, 64, 128),
        (torch.float32, 5, 1, 32, 128),
    ],
)
@pytest.mark.parametrize("window", [None, 8, 128])
def test_the_last_position_of_every_sequence(kernel, device, dtype, heads, kv_heads, head, size, window):
    if dtype == torch.bfloat16 and device == "cpu" and kernel.__name__.endswith("triton"):
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    lengths = (1, 7, 8, 9, 64, 130, 300)
    made, cos, sin, sinks = sequences(lengths, heads, kv_heads, head, dtype, device)
    pages = pages_for(lengths, kv_heads, head, size, window, dtype, device)
    order = torch.tensor([5, 0, 6, 2, 8, 1, 3], device=device)  # whose place is whose
    expected = []
    for place, whole in zip(order.tolist(), made, strict=True):
        turned = rotary.rope(whole[None, :, :-kv_heads], cos[None, : len(whole)], sin[None, : len(whole)])
        q, k, v = turned[:, :, :heads], turned[:, :, heads:], whole[None, :, -kv_heads:]
        fill(pages, place, k[0, :-1], v[0, :-1])
        expected.append(attention(q.double(), k.double(), v.double(), sinks.double(), 0.3, window)[0, -1])
    position = torch.tensor([length - 1 for length in lengths], device=device)
    q = kernel.append(torch.stack([whole[-1] for whole in made]), cos, sin, pages, order, position)
    got = kernel.attend(q, pages, order, position, sinks, 0.3)
    assert got.dtype == dtype
    for one, want in zip(got, expected, strict=True):
        assert (one.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_one_token_after_another_through_a_window(kernel, device):
    """From an empty cache past the window twice, two sequences out of step."""
    made, cos, sin, sinks = sequences((40, 37), 4, 2, 16, torch.float32, device)
    pages = pages_for((40, 37), 2, 16, 16, 8, torch.float32, device)
    places = torch.tensor([1, 0], device=device)
    for at in range(37):
        position = torch.tensor([at + 3, at], device=device)
        if at == 0:
            turned = rotary.rope(made[0][None, :3, 4:6], cos[None, :3], sin[None, :3])
            fill(pages, 1, turned[0], made[0][:3, 6:])
        rows = torch.stack([whole[p] for whole, p in zip(made, position.tolist(), strict=True)])
        got = kernel.attend(
            kernel.append(rows, cos, sin, pages, places, position), pages, places, position, sinks, 0.25
        )
        for one, whole, p in zip(got, made, position.tolist(), strict=True):
            turned = rotary.rope(whole[None, : p + 1, :6], cos[None, : p + 1], sin[None, : p + 1]).double()
            v = whole[None, : p + 1, 6:].double()
            want = attention(turned[:, :, :4], turned[:, :, 4:], v, sinks.double(), 0.25, 8)[0, -1]
            assert (one.double() - want).norm() <= 3e-6 * want.norm()


def test_large_logits_and_sinks_stay_finite(kernel, device):
    made, cos, sin, _ = sequences((200,), 4, 2, 16, torch.float32, device)
    pages = pages_for((200,), 2, 16, 16, None, torch.float32, device)
    turned = rotary.rope(made[0][None, :, :6] * 30, cos[None], sin[None])
    fill(pages, 0, turned[0, :-1, 4:], made[0][:-1, 6:])
    row = torch.cat((made[0][-1:, :6] * 30, made[0][-1:, 6:]), 1)
    place, position = torch.zeros(1, dtype=torch.long, device=device), torch.tensor([199], device=device)
    for sink in (-1e4, 0.0, 5000.0):
        sinks = torch.full((4,), sink, device=device)
        got = kernel.attend(kernel.append(row, cos, sin, pages, place, position), pages, place, position, sinks, 1.0)
        turned_all = turned.double()
        want = attention(
            turned_all[:, :, :4], turned_all[:, :, 4:], made[0][None, :, 6:].double(), sinks.double(), 1.0
        )[0, -1]
        assert (got[0].double() - want).norm() <= 1e-4 * want.norm() + 1e-12
