"""Base + adapter → plain weights, piece by piece: memory for one expert, whatever the model's size.

E experts, O outputs, I inputs, G = I / 32 blocks of a row.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ossia.adapters.deltas import AdapterDeltas, Delta, expert_shape
from ossia.adapters.files import CONFIG, WEIGHTS
from ossia.adapters.origin import check_origin
from ossia.console import progress, say
from ossia.errors import OssiaError, UsageError
from ossia.export.calibrate import Calibration, Given
from ossia.export.folder import INDEX, REPORT, check_output, write_json, write_rest
from ossia.export.shards import Part, Rounding, Shard, Unit, pack
from ossia.export.tensors import Spec, pieces
from ossia.kernels.mxfp4 import BLOCK, dequantize
from ossia.kernels.mxfp4.calibrated import quantize_calibrated
from ossia.kernels.mxfp4.search import quantize_search
from ossia.model.folder import by_file, read_json, weight_files
from ossia.model.names import PROJECTIONS
from ossia.model.stream import Stored, find_tensors, read_rows

_EXPERTS = tuple(f".experts.{projection}" for projection in PROJECTIONS)
_BIASES = tuple(f"{name}_bias" for name in _EXPERTS)
CALIBRATION = "calibration"
_RECIPE = 3
"""Version of what is written; with another one an interrupted export starts again."""


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
) -> Path:
    """Write the merged model to `output`, complete or not at all.

    Everything that can be known from headers and free space is checked first. What a stopped export has finished stays
    in `.NAME.part` beside `output`, and the same call goes on from there.

    `export_report.json` holds, for each expert tensor that was rounded to MXFP4, norms relative to the merged weights':
    `error` of what was written, `plain_error` of the plain rule (see `ossia.kernels.mxfp4`), `change` by the adapter;
    and `kept`, how much of that change the written weights make along its direction (1: all of it). With a calibration
    also `lost`, how far outputs on its inputs are from where the adapter moves them, relative to that move, and
    `nearest_lost`, the same by nearest rounding. It moves biases of rounded experts too.

    Args:
        base: model folder, experts in MXFP4 or floating point.
        adapter: folder in PEFT's layout.
        output: must not exist, or be empty.
        dtype: of the written weights, experts in transformers' own layout [E, I, O]; None keeps the base's dtypes and
            writes experts in MXFP4, as openai/gpt-oss-20b does.
        shard_bytes: size of a weight file.
        calibration: what experts are given; rounding to MXFP4 then keeps their outputs rather than their weights.
        device: where it is computed; default: the CPU.

    Raises:
        UsageError: `output` is not empty.
        OssiaError: an adapter that does not fit the base, damaged files, no space, weights that are not finite.
    """
    check_output(output)
    files = by_file(weight_files(base))
    units = merged_units(base, files, adapter, dtype, calibration, device)
    shards = pack(units, shard_bytes)

    key = key_of(files, adapter, calibration, dtype=str(dtype), shard_bytes=shard_bytes)
    part = Part(output, key, "weight files")
    done = {shard.file for shard in shards if part.has(shard)}
    left = sum(shard.nbytes for shard in shards if shard.file not in done)
    check_space(left + (calibration.nbytes if calibration and left else 0), output)
    if done:
        say(f"going on with a stopped export: {len(done)} of {len(shards)} weight files are finished")
    with part.kept_over_stops():
        if calibration and left:
            calibration.collect(part.folder / CALIBRATION)
        started = time.perf_counter()
        with progress("merging", len(units), "tensors") as advance:
            for shard in shards:
                if shard.file in done:
                    advance(len(shard.units))
                else:
                    part.write(shard, advance)
        made = time.perf_counter() - started - part.waited
        say(f"{left / 1e9:.1f} GB merged: {made:.1f} s reading and computing, {part.waited:.1f} s waiting for the disk")
        write_rest(base, part.folder, None if dtype is None else str(dtype).removeprefix("torch."))
        _write_index(part.folder, shards)
        if roundings := part.roundings():
            write_report(part.folder, roundings)
        shutil.rmtree(part.folder / CALIBRATION, ignore_errors=True)
        part.finish(output)
    return output


def merged_units(
    base: Path,
    files: Mapping[Path, Sequence[str]],
    adapter: Path,
    dtype: torch.dtype | None,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
) -> list[Unit]:
    """The merged model in pieces, planned from headers; see `merge`. Blocks and scales of experts take turns."""
    stored = find_tensors(files)
    _check_stored(base, stored, dtype)
    deltas = AdapterDeltas(adapter)
    units = list(_Merge(stored, deltas, dtype, calibration, device or torch.device("cpu")).units())
    check_origin(adapter, base)
    return units


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
        return expert_shape(self.dense, self.scales)

    def read(self, first: int, last: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Some experts, float32 [E, O, I], and the blocks and scales that they are, if that is how they are stored."""
        if self.dense is not None:
            return read_rows(self.dense, first, last).to(device).float().transpose(1, 2), None
        assert self.blocks is not None
        assert self.scales is not None
        blocks, scales = (read_rows(half, first, last).to(device) for half in (self.blocks, self.scales))
        return dequantize(blocks, scales, torch.float32), (blocks, scales)


@dataclass(frozen=True)
class _Merge:
    """How the tensors of a merged model are made."""

    stored: dict[str, Stored]
    deltas: AdapterDeltas
    dtype: torch.dtype | None
    calibration: Calibration | None
    device: torch.device

    def units(self) -> Iterator[Unit]:
        for name, entry in self.stored.items():
            stem, _, half = name.rpartition("_")
            if packed := _is_packed(name):
                experts = self._experts(stem)
            elif name.endswith(_EXPERTS):
                experts = self._experts(name)
            elif name.endswith(_BIASES) and self._is_rounded(name.removesuffix("_bias")):
                continue
            else:
                yield self._plain(name, entry, self.deltas.delta(name, entry.shape), self.dtype)
                continue
            delta = self.deltas.delta(experts.name, experts.shape)
            if packed and half == "scales":
                continue
            if self.dtype is not None:
                yield self._dense(experts, delta, self.dtype)
            elif packed and delta is None:
                yield self._kept(experts)
            else:
                yield self._mxfp4(experts, delta)

    def _is_rounded(self, name: str) -> bool:
        """Whether a projection is rounded by the calibration, and its bias moves with it."""
        if self.calibration is None:
            return False
        experts = self._experts(name)
        return experts.dense is not None or self.deltas.delta(name, experts.shape) is not None

    def _experts(self, name: str) -> _Experts:
        halves = (self.stored.get(f"{name}_{half}") for half in ("blocks", "scales"))
        return _Experts(name, self.stored.get(name), *halves)

    def _plain(self, name: str, entry: Stored, delta: Delta | None, dtype: torch.dtype | None) -> Unit:
        """A tensor in the dtype that is asked for, or its own; without a change in that, byte for byte."""
        spec = Spec(dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype, entry.shape)

        def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
            factors = delta.read(self.device) if delta else None
            for first, last in pieces(entry.shape, self.device):
                rows = read_rows(entry, first, last)
                if factors is not None:
                    rows = _finite(rows.to(self.device).float() + factors.rows(first, last), name)
                yield name, rows.to(spec.dtype)

        return Unit({name: spec}, make)

    def _dense(self, experts: _Experts, delta: Delta | None, dtype: torch.dtype) -> Unit:
        """Experts in floating point, [E, I, O]."""

        def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
            for _, _, weight_EOI, _ in self._merged(experts, delta):
                yield experts.name, weight_EOI.transpose(1, 2).to(dtype)

        return Unit({experts.name: Spec(dtype, experts.shape)}, make)

    def _kept(self, experts: _Experts) -> Unit:
        """Experts in MXFP4 that the adapter leaves alone, byte for byte."""
        assert experts.blocks is not None
        assert experts.scales is not None
        halves = {f"{experts.name}_blocks": experts.blocks, f"{experts.name}_scales": experts.scales}

        def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
            for first, last in pieces(experts.shape, self.device):
                for name, stored in halves.items():
                    yield name, read_rows(stored, first, last)

        return Unit({name: Spec(stored.dtype, stored.shape) for name, stored in halves.items()}, make)

    def _mxfp4(self, experts: _Experts, delta: Delta | None) -> Unit:
        """Experts in MXFP4, after a calibration with their bias; without one, blocks that the merge leaves alone stay
        the base's, byte for byte."""
        count, inputs, outputs = experts.shape
        if inputs % BLOCK:
            raise OssiaError(
                f"{experts.name} has {inputs} inputs, no multiple of {BLOCK}, which MXFP4 needs; take --format bf16"
            )
        scales_shape = (count, outputs, inputs // BLOCK)
        names = f"{experts.name}_blocks", f"{experts.name}_scales"
        specs = Spec(torch.uint8, (*scales_shape, BLOCK // 2)), Spec(torch.uint8, scales_shape)
        bias_name = f"{experts.name}_bias"
        bias = self.stored[bias_name] if self.calibration else None

        def make(roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
            given, told = self._given(experts), _Told()
            for (first, last), base_EOI, weight_EOI, packed in self._merged(experts, delta):
                found = quantize_search(weight_EOI)
                blocks, scales = found.blocks, found.scales
                if packed is not None:
                    same_EOG = (weight_EOI == base_EOI).reshape(*scales.shape, BLOCK).all(dim=-1)
                    blocks = torch.where(same_EOG.unsqueeze(-1), packed[0], blocks)
                    scales = torch.where(same_EOG, packed[1], scales)
                change_EOI, written_EOI = weight_EOI - base_EOI, dequantize(blocks, scales, torch.float32)
                if given is not None:
                    inputs = given(first, last)
                    told.add("moved", inputs.moved(change_EOI))
                    told.add("nearest_lost", inputs.moved(written_EOI - weight_EOI))
                    blocks, scales, shift_EO = quantize_calibrated(weight_EOI, inputs)
                    written_EOI = dequantize(blocks, scales, torch.float32)
                    told.add("lost", inputs.moved(written_EOI - weight_EOI, shift_EO))
                yield names[0], blocks
                yield names[1], scales
                if bias is not None:
                    bias_EO = read_rows(bias, first, last)
                    yield bias_name, (bias_EO.to(self.device).float() + shift_EO).to(bias.dtype)
                told.add("weight", weight_EOI.square().sum())
                told.add("error", (written_EOI - weight_EOI).square().sum())
                told.add("plain_error", found.plain_error.sum())
                told.add("change", change_EOI.square().sum())
                told.add("kept", ((written_EOI - base_EOI) * change_EOI).sum())
            roundings[experts.name] = told.rounding()

        outputs_of = dict(zip(names, specs, strict=True))
        return Unit(outputs_of if bias is None else outputs_of | {bias_name: Spec(bias.dtype, bias.shape)}, make)

    def _merged(
        self, experts: _Experts, delta: Delta | None
    ) -> Iterator[tuple[tuple[int, int], Tensor, Tensor, tuple[Tensor, Tensor] | None]]:
        """Piece by piece: first and last expert, the base's weights and the merged ones, float32 [E, O, I], and the
        base's blocks and scales."""
        factors = delta.read(self.device) if delta else None
        for first, last in pieces(experts.shape, self.device):
            base_EOI, packed = experts.read(first, last, self.device)
            weight_EOI = base_EOI if factors is None else base_EOI + factors.rows(first, last).transpose(1, 2)
            yield (first, last), base_EOI, _finite(weight_EOI, experts.name), packed

    def _given(self, experts: _Experts) -> Given | None:
        if self.calibration is None:
            return None
        module, _, projection = experts.name.rpartition(".")
        if projection == PROJECTIONS[0]:
            return self.calibration.given(module, self.device)
        first_product = self._experts(f"{module}.{PROJECTIONS[0]}")
        bias = self.stored[f"{first_product.name}_bias"]
        delta = self.deltas.delta(first_product.name, first_product.shape)
        factors = delta.read(self.device) if delta else None

        def weights(first: int, last: int) -> tuple[Tensor, Tensor]:
            weight_EOI, _ = first_product.read(first, last, self.device)
            if factors is not None:
                weight_EOI = weight_EOI + factors.rows(first, last).transpose(1, 2)
            return weight_EOI, read_rows(bias, first, last).to(self.device).float()

        return self.calibration.given(module, self.device, weights)


class _Told:
    """Sums over a tensor's pieces: of squares, and of products for `kept`; on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.double()

    def rounding(self) -> Rounding:
        """See `merge`."""
        sums = defaultdict(float, {name: float(value) for name, value in self._sums.items()})
        found = {name: _relative(sums[name], sums["weight"]) for name in ("error", "plain_error", "change")}
        found["kept"] = sums["kept"] / sums["change"] if sums["change"] else 1.0
        names = ("lost", "nearest_lost") if sums["moved"] else ()
        return found | {name: _relative(sums[name], sums["moved"]) for name in names}


def _relative(square: float, of: float) -> float:
    return math.sqrt(square / of) if of else 0.0


def _finite(weight: Tensor, name: str) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise OssiaError(
            f"{name}: merged weights hold NaN or infinity; take a checkpoint from before training diverged"
        )
    return weight


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


def key_of(files: Iterable[Path], adapter: Path, calibration: Calibration | None, **how: object) -> dict[str, object]:
    """What the written bytes depend on, for `Part`."""
    facts = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)}
    found = hashlib.sha256(repr(facts).encode())
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "recipe": _RECIPE,
        "sources": found.hexdigest(),
        "calibration": calibration and calibration.key,
        **how,
    }


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
    by_measure: dict[str, list[float]] = defaultdict(list)
    for rounding in roundings.values():
        for key, value in rounding.items():
            by_measure[key].append(value)
    mean = {key: fmean(values) for key, values in by_measure.items()}
    worst = {key: (min if key == "kept" else max)(values) for key, values in by_measure.items()}
    write_json(folder / REPORT, {"format": "mxfp4", "worst": worst, "mean": mean, "tensors": roundings})
    say(
        f"experts rounded to MXFP4: relative error {mean['error']:.2%} on average, {worst['error']:.2%} at worst "
        f"(plain rule: {mean['plain_error']:.2%}, {worst['plain_error']:.2%}); {mean['kept']:.0%} of the adapter's "
        f"change ({mean['change']:.2%}) is kept; by tensor in {REPORT}"
    )
    if "lost" in mean:
        say(
            f"on the calibration's inputs outputs miss {mean['lost']:.0%} of where the adapter moves them "
            f"(nearest rounding: {mean['nearest_lost']:.0%})"
        )
    elif mean["kept"] < 0.5:
        say(
            "warning: nearest rounding to four bits takes back most of this adapter's change to the experts; "
            "--calibrate true rounds for the outputs, --format bf16 keeps all of it"
        )
