"""Options of `ossia export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt
from ossia.config.hub import HUB_TITLES, HubOptions
from ossia.config.parts import AdapterOptions, RowOptions
from ossia.errors import UsageError


@dataclass
class ExportConfig(RowOptions, HubOptions, AdapterOptions, Config):
    """Write a model that runs without Ossia, or push what is there."""

    group_titles: ClassVar[dict[str, str]] = {
        "model": "what",
        "calibration": "calibration",
        "data": "how rows are read",
        "output": "where",
        **HUB_TITLES,
        "run": "run",
    }

    model: str | None = opt(
        None,
        "base model; default: the one the adapter was trained on. Without --adapters: a model folder to push",
        group="model",
    )
    merge_lora: bool = opt(False, "add the adapter to the base weights", group="model")
    format: str | None = opt(
        None,
        "mxfp4: gpt-oss's experts in 4 bits, a third of the size; gguf: the same in one file for llama.cpp and Ollama; "
        "bf16 keeps an adapter's change to the experts whole; default: as the base is, mxfp4 or bf16",
        group="model",
        choices=["bf16", "mxfp4", "gguf"],
    )
    torch_dtype: str | None = opt(
        None,
        "float32 writes --format bf16 in float32; default: bfloat16",
        group="model",
        choices=["bfloat16", "float32"],
    )
    calibrate: str = opt(
        "auto",
        "round experts to MXFP4 so that their outputs on rows stay, by a forward pass of base + adapter over these; "
        "auto: where the adapter changes experts, on a GPU with room for both, or with a base under 1 GB",
        group="calibration",
        choices=["auto", "true", "false"],
    )
    dataset: list[str] = opt([], "rows for it; default: those that the adapter was trained on", group="calibration")
    quant_n_samples: int = opt(128, "how many of them, drawn at random", group="calibration")
    max_length: int = opt(512, "tokens of a row that count", group="calibration")

    device: str = opt("auto", "auto takes a GPU where there is one", group="run", choices=["auto", "cuda", "cpu"])
    verify: bool = opt(
        True,
        "afterwards hold the files against base + adapter, in a new process; a GGUF file is only read back, always",
        group="output",
    )
    output_dir: str | None = opt(None, "folder to write; default: <adapters>-merged", group="output")
    max_shard_size: float = opt(5.0, "size of one weight file, GB", group="output")

    dry_run: bool = opt(False, "list what would be written and pushed, and do neither")

    def __post_init__(self) -> None:
        if isinstance(self.push_to_hub, bool):
            self.push_to_hub = str(self.push_to_hub).lower()
        if isinstance(self.calibrate, bool):
            self.calibrate = str(self.calibrate).lower()
        super().__post_init__()

    def validate(self) -> None:
        self.validate_hub()
        self.validate_rows()
        self.validate_adapters()
        if len(self.adapters) > 1 and not (self.merge_lora and self.output_dir):
            raise UsageError("several --adapters are merged into one model: give --merge_lora true and --output_dir")
        if self.adapter_weights and not self.merge_lora:
            raise UsageError("--adapter_weights goes with --merge_lora true; an adapter is pushed as it is")
        if not self.adapters and (self.merge_lora or not self.pushes or self.model is None):
            raise UsageError("give --adapters RUN/checkpoint-N")
        if not self.merge_lora and not self.pushes:
            raise UsageError("nothing to do: give --merge_lora true, or --push_to_hub org/name for the adapter alone")
        if self.format != "bf16" and self.torch_dtype is not None:
            raise UsageError("--torch_dtype is for --format bf16; give both, or leave it out")
        if self.format == "bf16" and (self.calibrate == "true" or self.dataset):
            flag = "calibrate true" if self.calibrate == "true" else "dataset"
            raise UsageError(f"--{flag} is for --format mxfp4 and gguf; bf16 rounds nothing to four bits")
        if self.dataset and self.calibrate == "false":
            raise UsageError("--dataset holds rows to calibrate on; leave it or --calibrate false out")
        for name in ("quant_n_samples", "max_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_shard_size <= 0:
            raise UsageError(f"--max_shard_size is {self.max_shard_size}; it must be above 0 GB")
