"""Ossia: LoRA fine-tuning for OpenAI's gpt-oss.

The pipeline, folder by folder: `data` (rows) → `template` (tokens and loss weights) → `model` (MXFP4-resident
gpt-oss) → `adapters` (LoRA on attention and experts) → `train` → `track` → `infer` → `serve` → `export`; `plan`
foretells, `bench` measures. Each command's options are one class in `config`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "Collator": "ossia.data.collate",
    "DataOptions": "ossia.config.parts",
    "DemoConfig": "ossia.config",
    "Engine": "ossia.infer.engine",
    "ExportConfig": "ossia.config",
    "InferConfig": "ossia.config",
    "OssiaError": "ossia.errors",
    "Sampling": "ossia.infer.engine",
    "ServeConfig": "ossia.config",
    "SftConfig": "ossia.config",
    "SftTrainer": "ossia.train.trainer",
    "add_lora": "ossia.adapters.inject",
    "ask": "ossia.infer.chat",
    "load_adapter": "ossia.adapters.io",
    "load_model": "ossia.model.load",
    "load_template": "ossia.template",
    "load_tokenizer": "ossia.model.tokenizer",
    "merge": "ossia.export.merge",
    "prepare": "ossia.data.prepare",
    "save_adapter": "ossia.adapters.io",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ossia' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
