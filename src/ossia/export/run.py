"""`ossia export`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ossia.adapters.files import base_model_of, check_adapter
from ossia.config import ExportConfig
from ossia.console import say, tool
from ossia.errors import OssiaError
from ossia.export.card import write_card
from ossia.export.folder import check_output
from ossia.model.folder import resolve_model


def run(config: ExportConfig) -> Path:
    """Merge, and say where the model is."""
    if config.format == "gguf" and find_spec("gguf") is None:
        raise OssiaError("--format gguf needs the package gguf: pip install 'ossia[gguf]'")
    adapter = check_adapter(str(config.adapters))
    output = Path(config.output_dir).expanduser().resolve() if config.output_dir else Path(f"{adapter}-merged")
    check_output(output)
    named = config.model or base_model_of(adapter)
    base = resolve_model(named)

    say(f"merging {adapter} into {base}")
    if config.format == "gguf":
        from ossia.export.gguf import FILE, MODELFILE, merge_gguf

        merge_gguf(base, adapter, output)
        write_card(output, named, adapter, "experts in MXFP4", gguf=FILE)
        say(f"merged model: {output / FILE} (experts in MXFP4; every tensor reads back as meant)")
        say(f"talk to it:  ollama create {output.name} -f {output / MODELFILE} && ollama run {output.name}")
        return output

    from ossia.export.merge import merge
    from ossia.model.load import DTYPES

    dtype = None if config.format == "mxfp4" else DTYPES[config.torch_dtype or "bfloat16"]
    merge(base, adapter, output, dtype, int(config.max_shard_size * 1e9))
    types = "experts in MXFP4" if dtype is None else str(dtype).removeprefix("torch.")
    write_card(output, named, adapter, types)
    say(f"merged model: {output} ({types}; loads with transformers alone)")
    if config.verify:
        _verify(config, adapter, output)
    say(f"talk to it:  {tool('ossia')} infer --model {output}")
    return output


def _verify(config: ExportConfig, adapter: Path, output: Path) -> None:
    """In a new process, which has nothing but the files. OssiaError where it finds that they say something else."""
    command = [sys.executable, "-m", "ossia", "verify", str(adapter), str(output)]
    if config.model is not None:
        command += ["--model", config.model]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("error: ") or f"{output}: verifying ended with {done.returncode}"
        raise OssiaError(f"{reason.splitlines()[-1]} (the files are complete; --verify false writes them unproved)")
