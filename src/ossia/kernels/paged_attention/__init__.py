"""Attention of one new token a sequence to all before it, which lie in pages of a cache.

B sequences, N query and M key-value heads, D head size, P pages of G positions, T pages a place may have.

`Pages` holds keys and values [P, M, G, D] and, for each place that a sequence may have, the numbers of its pages
[places, T]. Position p of a place lies in its page `p // G`, row `p % G`; with a window W, p is taken modulo W, so that
the newest W positions are all there is.

- `append(qkv_BHD, cos_LD2, sin_LD2, pages, place_B, position_B)` takes the projections of the new tokens, queries
  first, then keys, then values; turns queries and keys by their positions as `ossia.kernels.rope` does, with angles
  looked up in tables of all positions; writes keys and values into the cache and returns the queries [B, N, D].
- `attend(q_BND, pages, place_B, position_B, sinks_N, scale)` is what `ossia.kernels.attention` gives at the last of
  `position + 1` positions: [B, N, D] in q's dtype.
- `fill(pages, place, k_SMD, v_SMD)` writes the positions 0 to S - 1 of a place.

`triton` serves a GPU and waits for nothing, so `append` and `attend` may be captured in a CUDA graph. Two sequences of
one call may share a place only if nothing is asked of what is written there.
"""

from __future__ import annotations

from torch import Tensor

from ossia.kernels.available import HAS_TRITON
from ossia.kernels.paged_attention import reference
from ossia.kernels.paged_attention.reference import Pages, fill

__all__ = ["Pages", "append", "attend", "fill"]


def append(
    qkv_BHD: Tensor, cos_LD2: Tensor, sin_LD2: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor
) -> Tensor:
    """Queries, turned, [B, N, D]; by the fastest implementation for the device."""
    if qkv_BHD.is_cuda and HAS_TRITON:
        from ossia.kernels.paged_attention import triton

        return triton.append(qkv_BHD, cos_LD2, sin_LD2, pages, place_B, position_B)
    return reference.append(qkv_BHD, cos_LD2, sin_LD2, pages, place_B, position_B)


def attend(q_BND: Tensor, pages: Pages, place_B: Tensor, position_B: Tensor, sinks_N: Tensor, scale: float) -> Tensor:
    """[B, N, D] in q's dtype, by the fastest implementation for the device."""
    if q_BND.is_cuda and HAS_TRITON:
        from ossia.kernels.paged_attention import triton

        return triton.attend(q_BND, pages, place_B, position_B, sinks_N, scale)
    return reference.attend(q_BND, pages, place_B, position_B, sinks_N, scale)
