"""`ossia export`."""

from __future__ import annotations

from pathlib import Path

from ossia.adapters.files import base_model_of, check_adapter
from ossia.config import ExportConfig
from ossia.console import say, tool
from ossia.errors import UsageError
from ossia.model.folder import resolve_model


def run(config: ExportConfig) -> Path:
    """Merge, and say where the model is."""
    adapter = check_adapter(str(config.adapters))
    base = resolve_model(config.model or base_model_of(adapter))
    output = Path(config.output_dir).expanduser().resolve() if config.output_dir else Path(f"{adapter}-merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output_dir {output}: already there and not empty; remove it or name another folder")

    from ossia.export.merge import merge
    from ossia.model.load import DTYPES

    say(f"merging {adapter} into {base}")
    merge(base, adapter, output, DTYPES[config.torch_dtype], int(config.max_shard_size * 1e9))
    say(f"merged model: {output} ({config.torch_dtype}; loads with transformers alone)")
    say(f"talk to it:  {tool('ossia')} infer --model {output}")
    return output
