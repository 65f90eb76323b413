"""Base + adapter → plain weights, piece by piece: memory for one expert, whatever the model's size.

E experts, O outputs, I inputs, G = I / 32 blocks of a row.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ossia.adapters.files import CONFIG, WEIGHTS
from ossia.console import progress, say
from ossia.errors import OssiaError, UsageError
from ossia.export.deltas import AdapterDeltas, Delta
from ossia.export.folder import INDEX, REPORT, check_output, write_json, write_rest
from ossia.export.shards import Part, Rounding, Shard, Unit, pack
from ossia.export.tensors import Spec, pieces, read_rows
from ossia.kernels.mxfp4 import BLOCK, dequantize
from ossia.kernels.mxfp4.search import quantize_search
from ossia.model.folder import by_file, read_json, weight_files
from ossia.model.names import PROJECTIONS
from ossia.model.stream import Stored, find_tensors

_EXPERTS = tuple(f".experts.{projection}" for projection in PROJECTIONS)
_MEASURES = ("error", "plain_error", "change", "kept")
_RECIPE = 1
"""Version of what is written; with another one an interrupted export starts again."""


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype | None, shard_bytes: int) -> Path:
    """Write the merged model to `output`, complete or not at all.

    Everything that can be known from headers and free space is checked first. What a stopped export has finished stays
    in `.NAME.part` beside `output`, and the same call goes on from there.

    `export_report.json` holds, for each expert tensor that was rounded to MXFP4, norms relative to the merged weights':
    `error` of what was written, `plain_error` of the plain rule (see `ossia.kernels.mxfp4`), `change` by the adapter;
    and `kept`, how much of that change the written weights make along its direction (1: all of it).

    Args:
        base: model folder, experts in MXFP4 or floating point.
        adapter: folder in PEFT's layout.
        output: must not exist, or be empty.
        dtype: of the written weights, experts in transformers' own layout [E, I, O]; None keeps the base's dtypes and
            writes experts in MXFP4, as openai/gpt-oss-20b does.
        shard_bytes: size of a weight file.

    Raises:
        UsageError: `output` is not empty.
        OssiaError: an adapter that does not fit the base, damaged files, no space, weights that are not finite.
    """
    check_output(output)
    files = by_file(weight_files(base))
    units = merged_units(base, files, adapter, dtype)
    shards = pack(units, shard_bytes)

    part = Part(output, _key(files, adapter, dtype, shard_bytes))
    done = {shard.file for shard in shards if part.has(shard)}
    check_space(sum(shard.nbytes for shard in shards if shard.file not in done), output)
    if done:
        say(f"going on with a stopped export: {len(done)} of {len(shards)} weight files are finished")
    try:
        with progress("merging", len(units), "tensors") as advance:
            for shard in shards:
                if shard.file in done:
                    advance(len(shard.units))
                else:
                    part.write(shard, advance)
        write_rest(base, part.folder, None if dtype is None else str(dtype).removeprefix("torch."))
        _write_index(part.folder, shards)
        roundings = {name: rounding for shard in shards for name, rounding in part.done[shard.file].items()}
        if roundings:
            write_report(part.folder, roundings)
        part.finish(output)
    except OssiaError:
        part.remove()
        raise
    except OSError as error:
        raise OssiaError(f"{part.folder}: not written ({error.strerror or error}); {_left(part)}") from error
    except BaseException:
        say(_left(part))
        raise
    return output


def merged_units(
    base: Path, files: Mapping[Path, Sequence[str]], adapter: Path, dtype: torch.dtype | None
) -> list[Unit]:
    """The merged model in pieces, planned from headers; see `merge`. Blocks and scales of experts take turns."""
    stored = find_tensors(files)
    _check_stored(base, stored, dtype)
    deltas = AdapterDeltas(adapter)
    units = list(_units(stored, deltas, dtype))
    deltas.check_all_used(base)
    return units


def _left(part: Part) -> str:
    """Tidy up after a stop, and say what is left."""
    if not part.done:
        part.remove()
        return "nothing is left behind"
    return f"{len(part.done)} finished weight files stay in {part.folder}; the same command goes on from there"


@dataclass(frozen=True)
class _Experts:
    """An expert projection of the base, in either layout."""

    name: str
    dense: Stored | None
    blocks: Stored | None = None
    scales: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """E, I, O."""
        if self.dense is not None:
            return self.dense.shape
        assert self.scales is not None
        experts, outputs, groups = self.scales.shape
        return experts, groups * BLOCK, outputs

    def read(self, first: int, last: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Some experts, float32 [E, O, I], and the blocks and scales that they are, if that is how they are stored."""
        if self.dense is not None:
            return read_rows(self.dense, first, last).float().transpose(1, 2), None
        assert self.blocks is not None
        assert self.scales is not None
        packed = read_rows(self.blocks, first, last), read_rows(self.scales, first, last)
        return dequantize(*packed, torch.float32), packed


def _units(stored: dict[str, Stored], deltas: AdapterDeltas, dtype: torch.dtype | None) -> Iterator[Unit]:
    for name, entry in stored.items():
        stem, _, half = name.rpartition("_")
        if packed := _is_packed(name):
            experts = _Experts(stem, None, stored[f"{stem}_blocks"], stored[f"{stem}_scales"])
        elif name.endswith(_EXPERTS):
            experts = _Experts(name, entry)
        else:
            yield _plain(name, entry, deltas.linear(name, entry.shape), dtype)
            continue
        delta = deltas.experts(experts.name, experts.shape)
        if packed and half == "scales":
            continue
        if dtype is not None:
            yield _dense(experts, delta, dtype)
        elif packed and delta is None:
            yield _kept(experts)
        else:
            yield _mxfp4(experts, delta)


def _plain(name: str, entry: Stored, delta: Delta | None, dtype: torch.dtype | None) -> Unit:
    """A tensor in the dtype that is asked for, or its own; without a change in that, byte for byte."""
    spec = Spec(dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype, entry.shape)

    def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
        factors = delta.read() if delta else None
        for first, last in pieces(entry.shape):
            rows = read_rows(entry, first, last)
            if factors is not None:
                rows = _finite(rows.float() + factors.rows(first, last), name)
            yield name, rows.to(spec.dtype)

    return Unit({name: spec}, make)


def _dense(experts: _Experts, delta: Delta | None, dtype: torch.dtype) -> Unit:
    """Experts in floating point, [E, I, O]."""

    def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
        for _, weight_EOI, _ in _merged(experts, delta):
            yield experts.name, weight_EOI.transpose(1, 2).to(dtype)

    return Unit({experts.name: Spec(dtype, experts.shape)}, make)


def _kept(experts: _Experts) -> Unit:
    """Experts in MXFP4 that the adapter leaves alone, byte for byte."""
    assert experts.blocks is not None
    assert experts.scales is not None
    halves = {f"{experts.name}_blocks": experts.blocks, f"{experts.name}_scales": experts.scales}

    def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
        for first, last in pieces(experts.shape):
            for name, stored in halves.items():
                yield name, read_rows(stored, first, last)

    return Unit({name: Spec(stored.dtype, stored.shape) for name, stored in halves.items()}, make)


def _mxfp4(experts: _Experts, delta: Delta | None) -> Unit:
    """Experts in MXFP4; blocks that the merge leaves as they are stay the base's, byte for byte."""
    count, inputs, outputs = experts.shape
    if inputs % BLOCK:
        raise OssiaError(
            f"{experts.name} has {inputs} inputs, no multiple of {BLOCK}, which MXFP4 needs; take --format bf16"
        )
    scales_shape = (count, outputs, inputs // BLOCK)
    names = f"{experts.name}_blocks", f"{experts.name}_scales"
    specs = Spec(torch.uint8, (*scales_shape, BLOCK // 2)), Spec(torch.uint8, scales_shape)

    def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
        weight = error = plain_error = change = kept = 0.0
        for base_EOI, weight_EOI, packed in _merged(experts, delta):
            found = quantize_search(weight_EOI)
            blocks, scales, errors_EOG = found.blocks, found.scales, found.error
            if packed is not None:
                same_EOG = (weight_EOI == base_EOI).reshape(*scales.shape, BLOCK).all(dim=-1)
                blocks = torch.where(same_EOG.unsqueeze(-1), packed[0], blocks)
                scales = torch.where(same_EOG, packed[1], scales)
                errors_EOG = errors_EOG.masked_fill(same_EOG, 0)
            yield names[0], blocks
            yield names[1], scales
            weight += _square(weight_EOI)
            error += float(errors_EOG.sum())
            plain_error += float(found.plain_error.sum())
            change_EOI = weight_EOI - base_EOI
            change += _square(change_EOI)
            kept += float((dequantize(blocks, scales, torch.float32).sub_(base_EOI).mul_(change_EOI)).sum())
        norms = {"error": error, "plain_error": plain_error, "change": change}
        rounding = {key: math.sqrt(value / weight) if weight else 0.0 for key, value in norms.items()}
        roundings[experts.name] = rounding | {"kept": kept / change if change else 1.0}

    return Unit(dict(zip(names, specs, strict=True)), make)


def _merged(experts: _Experts, delta: Delta | None) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]]:
    """Piece by piece the base's weights and the merged ones, float32 [E, O, I], and the base's blocks and scales."""
    factors = delta.read() if delta else None
    for first, last in pieces(experts.shape):
        base_EOI, packed = experts.read(first, last)
        weight_EOI = base_EOI if factors is None else base_EOI + factors.rows(first, last).transpose(1, 2)
        yield base_EOI, _finite(weight_EOI, experts.name), packed


def _finite(weight: Tensor, name: str) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise OssiaError(
            f"{name}: merged weights hold NaN or infinity; take a checkpoint from before training diverged"
        )
    return weight


def _square(values: Tensor) -> float:
    return float(values.square().sum())


def _is_packed(name: str) -> bool:
    stem, _, half = name.rpartition("_")
    return half in ("blocks", "scales") and stem.endswith(_EXPERTS)


def _check_stored(base: Path, stored: dict[str, Stored], dtype: torch.dtype | None) -> None:
    """OssiaError where the base is stored in a way that can't be merged into, or written as asked."""
    config = read_json(base / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise OssiaError(f"{base}: weights are quantized by {method}; give --model with the model in bf16 or MXFP4")
    if dtype is None and config.get("model_type") != "gpt_oss":
        raise UsageError(f"--format mxfp4: {base} is no gpt-oss, so it has no experts in MXFP4; take --format bf16")
    for name in filter(_is_packed, stored):
        stem = name.rpartition("_")[0]
        blocks, scales = stored.get(f"{stem}_blocks"), stored.get(f"{stem}_scales")
        fits = blocks and scales and blocks.shape == (*scales.shape, BLOCK // 2) and len(scales.shape) == 3
        if not blocks or not scales or not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise OssiaError(
                f"{base}: {stem} is not MXFP4, whose blocks and scales are bytes [E, out, in/32, 16] and "
                "[E, out, in/32]; save the base again with save_original_format=False"
            )


def _key(files: Iterable[Path], adapter: Path, dtype: torch.dtype | None, shard_bytes: int) -> dict[str, Any]:
    """What the written bytes depend on."""
    facts = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)}
    found = hashlib.sha256(repr(facts).encode())
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return {"recipe": _RECIPE, "sources": found.hexdigest(), "dtype": str(dtype), "shard_bytes": shard_bytes}


def check_space(need: int, output: Path) -> None:
    """OssiaError where the disk has not this many bytes free."""
    there = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise OssiaError(
            f"--output_dir {output}: needs {need / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free; "
            "free some space or name a folder on another disk"
        )


def _write_index(folder: Path, shards: list[Shard]) -> None:
    weight_map = {name: shard.file for shard in shards for name in shard.specs}
    total = sum(shard.nbytes for shard in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_report(folder: Path, roundings: dict[str, Rounding]) -> None:
    """Write what rounding to MXFP4 did, and say the sum of it."""

    def over(pick: Callable[[list[float]], float], key: str) -> float:
        return pick([rounding[key] for rounding in roundings.values()])

    mean = {key: over(fmean, key) for key in _MEASURES}
    worst = {key: over(min if key == "kept" else max, key) for key in _MEASURES}
    write_json(folder / REPORT, {"format": "mxfp4", "worst": worst, "mean": mean, "tensors": roundings})
    say(
        f"experts rounded to MXFP4: relative error {mean['error']:.2%} on average, {worst['error']:.2%} at worst "
        f"(plain rule: {mean['plain_error']:.2%}, {worst['plain_error']:.2%}); {mean['kept']:.0%} of the adapter's "
        f"change ({mean['change']:.2%}) is kept; by tensor in {REPORT}"
    )
    if mean["kept"] < 0.5:
        say("warning: four bits are too coarse for this adapter's change to the experts; --format bf16 keeps all of it")
