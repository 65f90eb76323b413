"""The Hugging Face recipe in Python: load, LoRA with experts, tokenise, train, merge, generate.

python examples/recipe.py MODEL ROWS.jsonl OUTPUT
"""

import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

import ossia

base, data, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])

tokenizer = ossia.load_tokenizer(Path(base))
template = ossia.load_template(tokenizer)
rows = ossia.prepare([data], template, ossia.DataOptions(max_length=1024))
model = ossia.add_lora(ossia.load_model(base), rank=8, alpha=16, target_modules=["all-linear"], target_experts="all")

batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1}
rate = {"learning_rate": 2e-4, "warmup_steps": 0.03, "lr_scheduler_type": "cosine_with_min_lr"}
rate["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
quiet = {"save_strategy": "no", "report_to": "none", "remove_unused_columns": False}
args = TrainingArguments(output_dir=str(output), **batch, **rate, **quiet)
parts = {"data_collator": ossia.Collator(template.pad_id), "tokenizer": tokenizer, "base_model": base}
ossia.SftTrainer(model, args=args, train_dataset=rows, **parts).train()

ossia.save_adapter(model, output / "adapter", base)
merged = ossia.merge(Path(base), output / "adapter", output / "merged", torch.bfloat16, shard_bytes=5 * 10**9)
engine = ossia.Engine(ossia.load_model(merged), template)
print(ossia.ask(engine, "Who are you?", ossia.Sampling(max_new_tokens=32)))
