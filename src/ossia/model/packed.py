"""Packed rows: whether a model keeps those of one sequence apart."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from torch import nn

from ossia.model.gpt_oss import OssiaGptOssForCausalLM


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper and PEFT's."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def keeps_apart(model: nn.Module) -> bool:
    """Whether rows laid end to end see nothing of each other: tried on two short ones, but for our own model."""
    base = inner_model(model)
    if isinstance(base, OssiaGptOssForCausalLM):
        return True
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    ids = torch.arange(3, 11, device=next(model.parameters()).device)[None]
    positions = torch.arange(4, device=ids.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits.float()
    model.train(was_training)
    return bool((packed - alone).norm() <= 0.02 * alone.norm())
