"""Options of `ossia export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.errors import UsageError


@dataclass
class ExportConfig(Config):
    """Write a model that runs without Ossia."""

    group_titles: ClassVar[dict[str, str]] = {"model": "what", "output": "where", "run": "run"}

    adapters: str | None = opt(None, "checkpoint folder of a LoRA run", group="model")
    model: str | None = opt(None, "base model; default: the one the adapter was trained on", group="model")
    merge_lora: bool = opt(False, "add the adapter to the base weights", group="model")
    format: str = opt(
        "bf16",
        "mxfp4: gpt-oss's experts in 4 bits, a third of the size; small changes of experts are lost in it; "
        "gguf: the same in one file for llama.cpp and Ollama",
        group="model",
        choices=["bf16", "mxfp4", "gguf"],
    )
    torch_dtype: str | None = opt(
        None,
        "float32 writes --format bf16 in float32; default: bfloat16",
        group="model",
        choices=["bfloat16", "float32"],
    )
    verify: bool = opt(
        True,
        "afterwards hold the files against base + adapter, in a new process; a GGUF file is only read back, always",
        group="output",
    )
    output_dir: str | None = opt(None, "folder to write; default: <adapters>-merged", group="output")
    max_shard_size: float = opt(5.0, "size of one weight file, GB", group="output")

    def validate(self) -> None:
        if self.adapters is None:
            raise UsageError("give --adapters RUN/checkpoint-N")
        if not self.merge_lora:
            raise UsageError("nothing to do: give --merge_lora true")
        if self.format != "bf16" and self.torch_dtype is not None:
            raise UsageError(f"--torch_dtype is for --format bf16; {self.format} has its own types, so leave it out")
        if self.max_shard_size <= 0:
            raise UsageError(f"--max_shard_size is {self.max_shard_size}; it must be above 0 GB")
