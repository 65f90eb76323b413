"""Adapter folders, looked at without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ossia.errors import OssiaError, UsageError
from ossia.model.folder import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_DONE = ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save")


@dataclass(frozen=True)
class LoraSettings:
    """What `adapter_config.json` says. Targets are names, or endings of names: of linear layers, and of parameters of
    experts."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: list[str]
    target_parameters: list[str]

    @property
    def scaling(self) -> float:
        """Factor of every product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def read_settings(folder: Path) -> LoraSettings:
    """Read an adapter's configuration; OssiaError where it is damaged, or of an adapter that is more than LoRA."""
    file = folder / CONFIG
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise OssiaError(f"{file}: peft_type is {values.get('peft_type')!r}; only LORA adapters are read")
    for key in _NOT_DONE:
        if values.get(key):
            raise OssiaError(f"{file}: {key} is set, which is not supported here")
    modules = values.get("target_modules") or []
    if isinstance(modules, str):
        raise OssiaError(f"{file}: target_modules is the pattern {modules!r}; a list of names is needed")
    try:
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        if rank < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise OssiaError(f"{file}: r and lora_alpha are not both numbers above 0") from error
    parameters = values.get("target_parameters") or []
    return LoraSettings(rank, alpha, bool(values.get("use_rslora")), list(modules), list(parameters))


def check_adapter(name: str) -> Path:
    """The absolute folder of an adapter; UsageError where it is none."""
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        near = sorted(path.name for path in folder.parent.glob("checkpoint-*")) if folder.parent.is_dir() else []
        hint = f" (there: {', '.join(near)})" if near else ""
        raise UsageError(f"--adapters {name}: no such folder{hint}")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            near = sorted(path.name for path in folder.glob("checkpoint-*"))
            hint = f"; its checkpoints are {', '.join(near)}" if near else ""
            raise UsageError(f"--adapters {name}: no {file} in this folder, so it is not an adapter{hint}")
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors, on the CPU; OssiaError where the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise OssiaError(f"{folder / WEIGHTS}: damaged or cut short ({error})") from error


def base_model_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{adapter / CONFIG} names no base model; give --model DIR")
    return str(name)
