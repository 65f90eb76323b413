"""`ossia export`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ossia.adapters.files import WEIGHTS, base_model_of, check_adapter
from ossia.config import ExportConfig, InferConfig
from ossia.config.hub import HubOptions
from ossia.console import say, shown_bytes, tool
from ossia.data.sources import find_datasets
from ossia.errors import OssiaError, UsageError
from ossia.export.card import write_card
from ossia.export.folder import check_output, write_json
from ossia.export.hub import Hub, open_hub, push, show, sizes, staged_adapter, staged_model
from ossia.export.rows import conversations_of, drawn
from ossia.export.verify import RESULT
from ossia.infer.run import template_of
from ossia.model.folder import holds_mxfp4, read_json, resolve_model, weight_files
from ossia.train.adapters import one_adapter

_INSTEAD = "--format bf16 rounds nothing"
_SMALL = 1e9
"""Bytes of a base that is calibrated on a CPU without being asked."""
_NOT_OF_THE_MERGE = {*HubOptions.__dataclass_fields__, "device", "dry_run", "output_dir"}


def run(config: ExportConfig) -> Path:
    """Merge where it is asked for, push where it is asked for, and say where the result is."""
    if config.format == "gguf" and find_spec("gguf") is None:
        raise OssiaError("--format gguf needs the package gguf: pip install 'ossia[gguf]'")
    if config.merge_lora:
        with one_adapter(config.adapters, config.adapter_weights) as adapter:
            return _merged(config, adapter)
    repo = str(config.hub_model_id)
    if config.adapters:
        folder = check_adapter(config.adapters[0])
        staged = staged_adapter(folder, config.model or base_model_of(folder), repo)
    else:
        folder = _model_to_push(config)
        staged = staged_model(folder)
    with staged as files:
        if config.dry_run:
            show(config, sizes(files), folder)
        else:
            push(open_hub(config), files)
    return folder


def _merged(config: ExportConfig, adapter: Path) -> Path:
    output = Path(config.output_dir or f"{check_adapter(config.adapters[0])}-merged").expanduser().resolve()
    named = config.model or base_model_of(adapter)
    record, key = output.parent / f".{output.name}.push.json", _key(config, named)
    done = config.pushes and output.is_dir() and record.is_file() and read_json(record) == key
    if not done:
        check_output(output)
    if config.dry_run:
        _show_merge(config, named)
        return output
    # Before the base is downloaded or merged, which may take long.
    hub = open_hub(config) if config.pushes else None
    if not done:
        _merge(config, adapter, named, output)
    else:
        say(f"merged before: {output}")
    if hub is not None:
        write_json(record, key)
        _push_merged(hub, output)
        record.unlink()
    if config.format == "gguf":
        say(f"talk to it:  ollama create {output.name} -f {output / 'Modelfile'} && ollama run {output.name}")
    else:
        say(f"talk to it:  {tool('ossia')} infer --model {output}")
    return output


def _merge(config: ExportConfig, adapter: Path, named: str, output: Path) -> None:
    find_datasets(config.dataset, "--dataset")
    base = resolve_model(named)
    if config.format is None:
        config = replace(config, format=_format_of(base))
        more = "" if config.format == "bf16" else " (--format bf16 keeps the adapter's change to the experts whole)"
        say(f"format: {config.format}, as the base is{more}")

    from ossia.export.calibrate import Calibration
    from ossia.model.load import DTYPES, pick_device

    device = pick_device(config.device)
    options = InferConfig(adapters=[str(adapter)], model=config.model, device=config.device)
    texts = [] if config.format == "bf16" else _calibration_texts(config, adapter, base, options, device)
    calibration = Calibration(options, base, texts) if texts else None
    say(f"merging {' and '.join(config.adapters)} into {base}")
    if config.format == "gguf":
        from ossia.export.gguf import FILE, merge_gguf

        merge_gguf(base, adapter, output, calibration, device)
        write_card(output, named, adapter, "experts in MXFP4", config.hub_model_id, FILE)
        say(f"merged model: {output / FILE} (experts in MXFP4; every tensor reads back as meant)")
        return

    from ossia.export.merge import merge

    dtype = None if config.format == "mxfp4" else DTYPES[config.torch_dtype or "bfloat16"]
    merge(base, adapter, output, dtype, int(config.max_shard_size * 1e9), calibration, device)
    types = "experts in MXFP4" if dtype is None else str(dtype).removeprefix("torch.")
    write_card(output, named, adapter, types, config.hub_model_id)
    say(f"merged model: {output} ({types}; loads with transformers alone)")
    if config.verify:
        _verify(config, adapter, output)


def _format_of(base: Path) -> str:
    return "mxfp4" if holds_mxfp4(weight_files(base)) else "bf16"


def _calibration_texts(
    config: ExportConfig, adapter: Path, base: Path, options: InferConfig, device: Any
) -> list[list[int]]:
    """Token ids to calibrate on; none where it is not to be done, which `--calibrate auto` says and why."""
    auto = config.calibrate == "auto"
    if config.calibrate == "false":
        return []
    if auto and (reason := _reason_against(adapter, base, device)):
        say(f"not calibrated: {reason}")
        return []
    try:
        found = conversations_of(adapter, config.dataset, "dataset", config)
        if found is None:
            raise UsageError(f"the rows that {config.adapters[0]} was trained on are not there; give --dataset")
        rows = drawn(found, config.quant_n_samples)
        if not rows:
            raise UsageError("there are no conversations among the rows, only texts; give --dataset")
    except OssiaError as error:
        if not auto or config.dataset:
            raise type(error)(f"--calibrate {config.calibrate}: {error}") from None
        say(f"not calibrated: {error}, or {_INSTEAD}")
        return []
    _, template = template_of(options)
    return [template.render(row).input_ids[: config.max_length] for row in rows]


def _reason_against(adapter: Path, base: Path, device: Any) -> str | None:
    """Why `--calibrate auto` does not calibrate."""
    import torch

    from ossia.model.stream import read_header

    if not any(".experts." in name for name in read_header(adapter / WEIGHTS)):
        return "the adapter leaves the experts alone"
    stored = sum(file.stat().st_size for file in set(weight_files(base).values()))
    if device.type != "cuda":
        slow = f"it is slow without a GPU; --calibrate true does it all the same, or {_INSTEAD}"
        return slow if stored > _SMALL else None
    # Weights as on disk, adapter and what a pass takes; then some 15 GB for rounding, without the model.
    need = 1.1 * stored + 4e9
    free = torch.cuda.mem_get_info(device)[0]
    if need > free:
        return f"it would take {need / 1e9:.0f} GB of the GPU's memory, and {free / 1e9:.0f} GB are free; {_INSTEAD}"
    return None


def _verify(config: ExportConfig, adapter: Path, output: Path) -> None:
    """In a new process, which has nothing but the files. OssiaError where it finds that they say something else."""
    command = [sys.executable, "-m", "ossia", "verify", str(adapter), str(output)]
    if config.model is not None:
        command += ["--model", config.model]
    command += ["--device", config.device, "--on_bad_row", config.on_bad_row]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("error: ") or f"{output}: verifying ended with {done.returncode}"
        raise OssiaError(f"{reason.splitlines()[-1]} (the files are complete; --verify false writes them unproved)")


def _push_merged(hub: Hub, output: Path) -> None:
    try:
        with staged_model(output) as files:
            push(hub, files)
    except OssiaError as error:
        raise OssiaError(f"{error} ({output} is complete and is not merged again)") from None


def _key(config: ExportConfig, named: str) -> dict[str, Any]:
    """What makes a merged model that is not pushed yet the one that is asked for."""
    asked = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MERGE}
    folders = [check_adapter(name) for name in config.adapters]
    weights = [(folder / WEIGHTS).stat() for folder in folders]
    return asked | {
        "adapters": [str(folder) for folder in folders],
        "model": named,
        "weights": [[each.st_size, each.st_mtime_ns] for each in weights],
    }


def _model_to_push(config: ExportConfig) -> Path:
    folder = Path(str(config.model)).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"--model {config.model}: no such folder; without --adapters it is the folder to push")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"--model {config.model} is an adapter; push it with --adapters {config.model}")
    if not any(folder.glob("*.gguf")):
        if not (folder / "config.json").is_file():
            raise UsageError(f"--model {config.model}: no config.json in this folder; is it a model folder?")
        weight_files(folder)
    if config.verify and (folder / RESULT).is_file() and not read_json(folder / RESULT).get("verified"):
        raise OssiaError(
            f"{folder / RESULT} says that the model was not verified, so it is not pushed; --verify false pushes it "
            "all the same"
        )
    return folder


def _show_merge(config: ExportConfig, named: str) -> None:
    """What a merge would write; the weights' size is that of their values."""
    base = Path(named).expanduser()
    files = {"README.md, tokenizer and configuration": "small"}
    if base.is_dir():
        from ossia.model.folder import by_file
        from ossia.model.stream import find_tensors

        stored = find_tensors(by_file(weight_files(base)))
        width = 4 if config.torch_dtype == "float32" else 2
        size = sum(entry.nbytes for entry in stored.values())
        if (config.format or _format_of(base)) == "bf16":
            size = sum(
                2 * entry.nbytes * width if name.endswith("_blocks") else entry.nbytes // entry.dtype.itemsize * width
                for name, entry in stored.items()
                if not name.endswith("_scales")
            )
        files["*.gguf" if config.format == "gguf" else "*.safetensors"] = f"about {shown_bytes(size)}"
    else:
        files["*.gguf" if config.format == "gguf" else "*.safetensors"] = (
            f"as large as the base makes them ({named} is not on this machine)"
        )
    say(f"would merge {' and '.join(config.adapters)} into {named}{' and verify the result' if config.verify else ''}")
    show(config, files, None)
