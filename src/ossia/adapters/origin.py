"""Which weights an adapter was trained on: a fingerprint of the base, kept in the metadata of the adapter's file."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ossia.adapters.deltas import AdapterDeltas, expert_shape
from ossia.adapters.files import CONFIG, WEIGHTS
from ossia.errors import OssiaError
from ossia.kernels.mxfp4 import BLOCK, dequantize
from ossia.model.folder import by_file, read_json, weight_files
from ossia.model.names import PROJECTIONS
from ossia.model.stream import Stored, find_tensors, read_rows

KEY = "base_fingerprint"
_VALUES = 1024


@functools.lru_cache(maxsize=2)
def fingerprint(base: Path) -> str:
    """Of a model's weights, the same whether experts are in MXFP4 or in the bfloat16 that this stands for.

    The hash of every tensor's name, shape and first values in bfloat16; of a projection of experts, one block of 32
    inputs of one expert. Reads some MB.
    """
    stored = find_tensors(by_file(weight_files(base)))
    found = hashlib.sha256()
    for name in sorted({_whole(name) for name in stored}):
        values = _expert_values(stored, name) if name.endswith(PROJECTIONS) else _first_values(stored[name])
        found.update(name.encode())
        values = values.bfloat16() + 0  # a merge makes zeros of negative zeros
        found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def origin_of(adapter: Path) -> str | None:
    """The fingerprint that an adapter carries, if any: other tools write none."""
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise OssiaError(f"{adapter / WEIGHTS}: damaged or cut short ({error})") from error


def check_origin(adapter: Path, base: Path) -> None:
    """OssiaError where an adapter does not fit `base`, or was trained on other weights. Reads headers, and some MB for
    the fingerprint."""
    stored = find_tensors(by_file(weight_files(base)))
    shapes = {
        name: expert_shape(stored.get(name), stored.get(f"{name}_scales"))
        if name.endswith(PROJECTIONS)
        else stored[name].shape
        for name in {_whole(name) for name in stored}
    }
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and not name.endswith("_bias")}
    AdapterDeltas(adapter).check(matrices, str(base))
    origin = origin_of(adapter)
    if origin is not None and origin != fingerprint(base):
        named = read_json(adapter / CONFIG).get("base_model_name_or_path")
        raise OssiaError(
            f"{adapter}: adapter of another base model; it was trained on {named}, whose weights are not those in "
            f"{base}; give --model with its own base"
        )


def _whole(name: str) -> str:
    """A projection's name for its blocks and scales."""
    stem, _, half = name.rpartition("_")
    return stem if half in ("blocks", "scales") and stem.endswith(PROJECTIONS) else name


def _first_values(stored: Stored) -> torch.Tensor:
    rows = stored.shape[0] if stored.shape else 1
    width = max(1, torch.Size(stored.shape).numel() // max(rows, 1))
    return read_rows(stored, 0, min(rows, -(-_VALUES // width))).flatten()[:_VALUES]


def _expert_values(stored: dict[str, Stored], name: str) -> torch.Tensor:
    """The first output's weights on the first 32 inputs, of an expert that differs from layer to layer."""
    blocks = stored.get(f"{name}_blocks")
    experts = (blocks or stored[name]).shape[0]
    expert = sum(map(int, filter(str.isdigit, name))) % experts
    if blocks is not None:
        one, scale = (read_rows(half, expert, expert + 1)[0, :1, :1] for half in (blocks, stored[f"{name}_scales"]))
        return dequantize(one, scale, torch.bfloat16).flatten()
    dense = stored[name]
    inputs = dense.shape[1]
    # [E, I, O] read as [E I, O]: the rows wanted are neighbours.
    flat = dense._replace(shape=(experts * inputs, *dense.shape[2:]))
    return read_rows(flat, expert * inputs, expert * inputs + BLOCK)[:, 0]
