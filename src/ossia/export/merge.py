"""Base + adapter → plain weights, tensor by tensor: memory for one layer's experts, whatever the model's size."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ossia.adapters.files import CONFIG, WEIGHTS
from ossia.compat import save_tensors
from ossia.console import progress
from ossia.errors import OssiaError
from ossia.kernels.mxfp4 import dequantize
from ossia.model.folder import read_json, weight_files

_KEPT = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "LICENSE*")


class AdapterDeltas:
    """What an adapter on disk (PEFT's layout) adds to each base tensor."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        for key in ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias"):
            if config.get(key):
                raise OssiaError(f"{folder / CONFIG}: {key} is set, which this merge does not do")
        try:
            self.tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise OssiaError(f"{folder / WEIGHTS}: damaged or cut short ({error})") from error
        rank = config["r"]
        self.scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.left = {key for key in self.tensors if key.endswith(".lora_A.weight")}

    def linear(self, name: str, shape: torch.Size) -> Tensor | None:
        """The change of a linear layer's weight `name`, float32 [out, in]."""
        pair = self._pair(f"base_model.model.{name.removesuffix('.weight')}")
        if pair is None:
            return None
        a_RI, b_OR = pair
        return self._checked(b_OR @ a_RI * self.scaling, shape, name)

    def expert(self, name: str, shape: torch.Size) -> Tensor | None:
        """The change of an expert projection `name`, float32 [E, in, out]."""
        module, _, projection = name.rpartition(".")
        pair = self._pair(f"base_model.model.{module}{'.base_layer' if projection == 'gate_up_proj' else ''}")
        if pair is None:
            return None
        a, b = pair
        count = shape[0]
        if a.shape[0] % count:
            raise OssiaError(f"adapter of another base model: {name} has {count} experts, lora_A {a.shape[0]} rows")
        a_EIR = a.view(count, -1, a.shape[1]).transpose(1, 2)
        b_ERO = b.view(b.shape[0], -1, count).permute(2, 1, 0)
        if (a_EIR.shape[1], b_ERO.shape[2]) != tuple(shape[1:]):
            raise OssiaError(f"adapter of another base model: {name} is {tuple(shape)} there")
        return torch.bmm(a_EIR, b_ERO) * self.scaling

    def _pair(self, prefix: str) -> tuple[Tensor, Tensor] | None:
        key = f"{prefix}.lora_A.weight"
        if key not in self.tensors:
            return None
        self.left.discard(key)
        return self.tensors[key].float(), self.tensors[f"{prefix}.lora_B.weight"].float()

    def _checked(self, delta: Tensor, shape: torch.Size, name: str) -> Tensor:
        if delta.shape != shape:
            raise OssiaError(
                f"adapter of another base model: {name} is {tuple(shape)} there, the adapter needs {tuple(delta.shape)}"
            )
        return delta


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype, shard_bytes: int) -> Path:
    """Write the merged model to `output`, complete or not at all.

    Args:
        base: model folder, experts in MXFP4 or floating point.
        adapter: folder in PEFT's layout.
        output: must not exist, or be empty.
        dtype: of the written weights.
        shard_bytes: size of a weight file.

    Raises:
        OssiaError: an adapter that does not fit the base, damaged files, no space.
    """
    files = weight_files(base)
    deltas = AdapterDeltas(adapter)
    part = output.parent / f".{output.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _check_space(files, part, dtype)
        weight_map, total = _write_shards(_merged(files, deltas, dtype), part, shard_bytes)
        if deltas.left:
            raise OssiaError(
                f"{adapter}: {len(deltas.left)} adapter tensors have no weight in {base}, "
                f"first {sorted(deltas.left)[0]}"
            )
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_config(base, part, dtype)
        for pattern in _KEPT:
            for file in base.glob(pattern):
                shutil.copy(file, part)
        if output.is_dir():
            output.rmdir()
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return output


def _merged(files: dict[str, Path], deltas: AdapterDeltas, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    opened: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in set(files.values())}

    def read(name: str) -> Tensor:
        try:
            return opened[files[name]].get_tensor(name)
        except SafetensorError as error:
            raise OssiaError(f"{files[name]}: damaged or cut short ({error}); copy it again") from error

    names = [name for name in files if not name.endswith("_scales")]
    with progress("merging", len(names), "tensors") as advance:
        for name in names:
            advance(1)
            if name.endswith("_proj_blocks"):
                stem = name.removesuffix("_blocks")
                dense = dequantize(read(name), read(f"{stem}_scales"), torch.float32).transpose(1, 2)
                yield stem, _add(dense, deltas.expert(stem, dense.shape), dtype)
                continue
            tensor = read(name)
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                yield name, _add(tensor, deltas.expert(name, tensor.shape), dtype)
            else:
                yield name, _add(tensor, deltas.linear(name, tensor.shape), dtype)


def _add(tensor: Tensor, delta: Tensor | None, dtype: torch.dtype) -> Tensor:
    merged = tensor if delta is None else tensor.float() + delta
    return merged.to(dtype).contiguous()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> tuple[dict[str, str], int]:
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal batch, size
        if batch:
            shards.append(list(batch))
            save_tensors(batch, folder / f"shard-{len(shards)}")
            batch, size = {}, 0

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if size + nbytes > shard_bytes:
            flush()
        batch[name] = tensor
        size += nbytes
        total += nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    return weight_map, total


def _write_config(base: Path, folder: Path, dtype: torch.dtype) -> None:
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_space(files: dict[str, Path], folder: Path, dtype: torch.dtype) -> None:
    need = 0
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                values = math.prod(opened.get_slice(name).get_shape())
                need += (
                    0 if name.endswith("_scales") else values * dtype.itemsize * (2 if name.endswith("_blocks") else 1)
                )
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OssiaError(f"{folder.parent}: the merged model takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
