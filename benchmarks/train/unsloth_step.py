"""Unsloth's gpt-oss LoRA, r=8 on attention and all experts, 16 bit, its own checkpointing.

python benchmarks/train/unsloth_step.py MODEL BATCH LENGTH [STEPS]     prints one JSON line
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")

import unsloth  # noqa: I001 - first: it replaces parts of the others
import torch
import transformers
from peer import measure

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "gate_proj", "up_proj"]


def main() -> None:
    path, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 7
    load = unsloth.FastLanguageModel.from_pretrained
    model, _ = load(path, max_seq_length=length, load_in_4bit=False, dtype=torch.bfloat16, local_files_only=True)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing="unsloth"
    )
    versions = {"unsloth": unsloth.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({**measure(model, batch, length, steps), "versions": versions}))


if __name__ == "__main__":
    main()
