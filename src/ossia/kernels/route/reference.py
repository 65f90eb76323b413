"""The contract of `ossia.kernels.route` in PyTorch. T tokens, H hidden, E experts, K of them chosen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts' numbers (int64) and weights (float32, differentiable in `hidden_TH`), [T, K] each; and `hidden_TH`.

    Args:
        hidden_TH: float32 or bfloat16; the gradient has its dtype.
        weight_EH: the frozen router, any float.
        bias_E: likewise.
        top_k: experts per token, 1 to E.
    """
    with torch.autocast(hidden_TH.device.type, enabled=False):
        logits_TE = F.linear(hidden_TH.float(), weight_EH.detach().float(), bias_E.detach().float())
    # `topk` promises nothing about ties; a stable sort does.
    index_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return index_TK, logits_TE.gather(1, index_TK).softmax(-1), hidden_TH
