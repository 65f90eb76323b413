"""The contract of `ossia.kernels.paged_attention` in PyTorch, on any device. Letters as there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ossia.kernels.rope import reference as rotary


class Pages(NamedTuple):
    """`k` and `v` [P, M, G, D] of one dtype, `table` int32 [places, T], `window` in positions or None."""

    k: Tensor
    v: Tensor
    table: Tensor
    window: int | None = None

    def slots(self, place: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Page and row of positions, int64, in the shape that `place` and `position` broadcast to."""
        size = self.k.shape[2]
        at = position if self.window is None else position % self.window
        return self.table[place, at // size].long(), at % size


def append(
    qkv_BHD: Tensor, cos_LD2: Tensor, sin_LD2: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor
) -> Tensor:
    """Queries, turned, [B, N, D].

    Args:
        qkv_BHD: [B, N + 2M, D].
        cos_LD2, sin_LD2: float32 of the positions 0 to L - 1.
        pages: written to.
        place_B, position_B: int64.
    """
    kv_heads = pages.k.shape[1]
    cos_B1D, sin_B1D = cos_LD2[position_B][:, None], sin_LD2[position_B][:, None]
    turned = rotary.rope(qkv_BHD[:, None, :-kv_heads], cos_B1D, sin_B1D)[:, 0]
    page_B, row_B = pages.slots(place_B, position_B)
    pages.k[page_B, :, row_B] = turned[:, -kv_heads:]
    pages.v[page_B, :, row_B] = qkv_BHD[:, -kv_heads:]
    return turned[:, :-kv_heads]


def attend(q_BND: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor, sinks_N: Tensor, scale: float) -> Tensor:
    """[B, N, D] in q's dtype; the softmax is float32, or float64 for float64 inputs. As long as the longest sequence.

    Args:
        q_BND: queries of the tokens at `position_B`, whose keys and values are in the cache.
        pages: read.
        place_B, position_B: int64.
        sinks_N: any float.
        scale: of the logits.
    """
    kv_heads, size = pages.k.shape[1:3]
    batch, heads, head = q_BND.shape
    seen_B = position_B + 1 if pages.window is None else (position_B + 1).clamp(max=pages.window)
    count = -(-int(seen_B.max()) // size)
    number_BT = pages.table[place_B, :count].long()
    # [B, T, M, G, D] → [B, M, T·G, D]
    k, v = (x[number_BT].transpose(1, 2).flatten(2, 3) for x in (pages.k, pages.v))
    wide = torch.promote_types(q_BND.dtype, torch.float32)
    q = q_BND.reshape(batch, kv_heads, heads // kv_heads, head).to(wide)
    logits = (q @ k.to(wide).transpose(2, 3)) * scale
    hidden_BC = torch.arange(count * size, device=q.device) >= seen_B[:, None]
    logits = logits.masked_fill(hidden_BC[:, None, None], float("-inf"))
    sinks = sinks_N.to(wide).view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
    share = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1]
    # What no one has written may be anything, also no number.
    v = v.masked_fill(hidden_BC[:, None, :, None], 0.0)
    return (share.to(v.dtype) @ v).reshape(q_BND.shape)


def fill(pages: Pages, place: int, k_SMD: Tensor, v_SMD: Tensor) -> None:
    """Write the positions 0 to S - 1 of a place; of a window the last alone."""
    length = len(k_SMD)
    start = 0 if pages.window is None else max(0, length - pages.window)
    position = torch.arange(start, length, device=k_SMD.device)
    page, row = pages.slots(torch.full_like(position, place), position)
    pages.k[page, :, row] = k_SMD[start:].to(pages.k.dtype)
    pages.v[page, :, row] = v_SMD[start:].to(pages.v.dtype)
