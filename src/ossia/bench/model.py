"""gpt-oss with random weights at its true size, made on the device it trains on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import GptOssConfig

from ossia.model.gpt_oss import OssiaGptOssForCausalLM
from ossia.model.load import on_host, put, unfilled
from ossia.model.sizes import SIZES


def config_of(size: str) -> GptOssConfig:
    """transformers' configuration of `20b`, `120b` or `tiny`."""
    return GptOssConfig(**SIZES[size])


def random_model(
    config: GptOssConfig,
    device: torch.device,
    offload: Collection[str] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> OssiaGptOssForCausalLM:
    """A frozen model with MXFP4 experts, normal weights of deviation 0.02.

    Args:
        config: sizes.
        device: where it trains.
        offload: names of tensors that rest in pinned host memory.
        seed: of the weights.
        dtype: of all but experts and routers.
    """
    model = unfilled(config, dtype, device, quantized=True)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("model.rotary"):
            continue
        value = _random(name, tensor.shape, device, dtype, generator)
        put(model, name, on_host(value) if name in offload else value)
    return model.eval()


def _random(
    name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    if name.endswith("_blocks"):
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    if name.endswith("_scales"):
        return torch.randint(119, 121, shape, dtype=torch.uint8, device=device, generator=generator)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype, device=device)
    kind = torch.float32 if ".router." in name else dtype
    return torch.empty(shape, dtype=kind, device=device).normal_(0, 0.02, generator=generator)
