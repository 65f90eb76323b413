"""gpt-oss with random weights at its true size, made on the device it trains on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import GptOssConfig

from ossia.model import attention
from ossia.model.gpt_oss import OssiaGptOssForCausalLM

SIZES = {"20b": (24, 32), "120b": (36, 128)}
"""Layers and experts of openai/gpt-oss-<size>; all else is the same in both."""


def config_of(size: str) -> GptOssConfig:
    """transformers' configuration of openai/gpt-oss-20b or -120b."""
    layers, experts = SIZES[size]
    return GptOssConfig(num_hidden_layers=layers, num_local_experts=experts)


def random_model(
    config: GptOssConfig, device: torch.device, offload: Collection[str] = (), seed: int = 0
) -> OssiaGptOssForCausalLM:
    """A frozen model in bfloat16 with MXFP4 experts, normal weights of deviation 0.02.

    Args:
        config: sizes.
        device: where it trains.
        offload: names of tensors that rest in pinned host memory.
        seed: of the weights.
    """
    supported = attention.supports_flash(device, torch.bfloat16)
    config._attn_implementation = attention.NAME if supported else "eager"
    config.output_router_logits = False
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = OssiaGptOssForCausalLM(config, quantized=True)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("model.rotary"):
            continue
        owner, _, leaf = name.rpartition(".")
        value = _random(name, tensor.shape, device, generator)
        if name in offload:
            value = value.cpu().pin_memory()
        kind = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        setattr(model.get_submodule(owner), leaf, kind)
    model.model.rotary_emb = attention.RotaryEmbedding(config).to(device)
    return model.eval()


def _random(name: str, shape: torch.Size, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("_blocks"):
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    if name.endswith("_scales"):
        return torch.randint(119, 121, shape, dtype=torch.uint8, device=device, generator=generator)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    kind = torch.float32 if ".router." in name else torch.bfloat16
    return torch.empty(shape, dtype=kind, device=device).normal_(0, 0.02, generator=generator)
