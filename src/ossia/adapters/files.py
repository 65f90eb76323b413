"""Adapter folders, looked at without torch."""

from __future__ import annotations

from pathlib import Path

from ossia.errors import UsageError
from ossia.model.folder import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def base_model_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{adapter / CONFIG} names no base model; give --model DIR")
    return str(name)
