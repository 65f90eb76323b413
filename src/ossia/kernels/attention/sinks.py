"""What turns the answer of an attention without sinks into one with them."""

from __future__ import annotations

from torch import Tensor

from ossia.kernels.available import HAS_TRITON


def apply_sinks_(out_BNSD: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> None:
    """In place: `out · sigmoid(lse - sink)`, and `lse` with the sink in its sum.

    Args:
        out_BNSD: of any strides but D's, which is one; D a power of two on a GPU.
        lse_BNS: float32, contiguous: log-sum-exp of each query's logits.
        sinks_N: contiguous, any float.
    """
    if out_BNSD.is_cuda and HAS_TRITON:
        from ossia.kernels.attention import sinks_triton

        sinks_triton.apply_sinks_(out_BNSD, lse_BNS, sinks_N)
    else:
        reference_(out_BNSD, lse_BNS, sinks_N)


def reference_(out_BNSD: Tensor, lse_BNS: Tensor, sinks_N: Tensor) -> None:
    """`apply_sinks_` in PyTorch, on any device."""
    sinks_N1 = sinks_N.float()[:, None]
    out_BNSD.mul_((lse_BNS - sinks_N1).sigmoid()[..., None])
    lse_BNS.copy_(lse_BNS.logaddexp(sinks_N1))
