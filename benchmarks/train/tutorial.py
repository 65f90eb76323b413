"""The tutorial's recipe, at gpt-oss-20b's size with random weights: dequantized bfloat16, transformers and PEFT.

python benchmarks/train/tutorial.py BATCH LENGTH [STEPS]     prints one JSON line

LoRA r=8 on attention and the experts of layers 7, 15 and 23, eager attention, gradient checkpointing.
"""

from __future__ import annotations

import json
import sys

import peft
import torch
import transformers
from peer import measure


def build() -> torch.nn.Module:
    """transformers' model on the GPU, frozen values drawn there."""
    config = transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32, use_cache=False)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    for name, parameter in model.named_parameters():
        (parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(0, 0.02))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    layers = (7, 15, 23)
    experts = [f"{layer}.mlp.experts.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", target_parameters=experts)
    adapted = peft.get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def main() -> None:
    batch, length, steps = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 6
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    print(json.dumps({**measure(build(), batch, length, steps), "versions": versions}))


if __name__ == "__main__":
    main()
