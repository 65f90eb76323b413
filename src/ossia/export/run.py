"""`ossia export`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ossia.adapters.files import base_model_of, check_adapter
from ossia.config import ExportConfig, InferConfig
from ossia.console import say, tool
from ossia.errors import OssiaError, UsageError
from ossia.export.card import write_card
from ossia.export.folder import check_output
from ossia.export.rows import conversations_of, drawn
from ossia.infer.run import template_of
from ossia.model.folder import resolve_model


def run(config: ExportConfig) -> Path:
    """Merge, and say where the model is."""
    adapter = check_adapter(str(config.adapters))
    output = Path(config.output_dir).expanduser().resolve() if config.output_dir else Path(f"{adapter}-merged")
    check_output(output)
    named = config.model or base_model_of(adapter)
    base = resolve_model(named)

    options = InferConfig(adapters=str(adapter), model=config.model, device=config.device)
    texts = _calibration_texts(config, adapter, options) if config.calibrate else []

    from ossia.export.calibrate import Calibration
    from ossia.export.merge import merge
    from ossia.model.load import DTYPES, pick_device

    device = pick_device(config.device)
    calibration = Calibration(options, base, texts) if texts else None
    dtype = None if config.format == "mxfp4" else DTYPES[config.torch_dtype or "bfloat16"]
    say(f"merging {adapter} into {base}")
    merge(base, adapter, output, dtype, int(config.max_shard_size * 1e9), calibration, device)
    types = "experts in MXFP4" if dtype is None else str(dtype).removeprefix("torch.")
    write_card(output, named, adapter, types)
    say(f"merged model: {output} ({types}; loads with transformers alone)")
    if config.verify:
        _verify(config, adapter, output)
    say(f"talk to it:  {tool('ossia')} infer --model {output}")
    return output


def _calibration_texts(config: ExportConfig, adapter: Path, options: InferConfig) -> list[list[int]]:
    found = conversations_of(adapter, config.dataset, "dataset")
    if found is None:
        raise UsageError(f"--calibrate true: the rows that {adapter} was trained on are not there; give --dataset")
    rows = drawn(found, config.quant_n_samples)
    if not rows:
        raise UsageError("--calibrate true: there are no conversations among the rows, only texts; give --dataset")
    _, template = template_of(options)
    return [template.render(row).input_ids[: config.max_length] for row in rows]


def _verify(config: ExportConfig, adapter: Path, output: Path) -> None:
    """In a new process, which has nothing but the files. OssiaError where it finds that they say something else."""
    command = [sys.executable, "-m", "ossia", "verify", str(adapter), str(output)]
    if config.model is not None:
        command += ["--model", config.model]
    command += ["--device", config.device]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("error: ") or f"{output}: verifying ended with {done.returncode}"
        raise OssiaError(f"{reason.splitlines()[-1]} (the files are complete; --verify false writes them unproved)")
