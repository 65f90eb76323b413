"""The adapter that `--adapters` and `--adapter_weights` mean, and a run that goes on from it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ossia.adapters.combine import combine
from ossia.adapters.files import check_adapter, read_settings
from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.train.folder import CONFIG, run_of

if TYPE_CHECKING:
    from ossia.adapters.deltas import AdapterDeltas


@contextmanager
def one_adapter(names: Sequence[str], weights: Sequence[float]) -> Iterator[Path]:
    """Its folder; where it is a sum, a folder that lasts as long as the context.

    Around a sum lies the first one's run: what a run settles (template, rows) is settled by that.

    Args:
        names: of `--adapters`.
        weights: of `--adapter_weights`; none: 1 each.

    Raises:
        UsageError: a folder that is no adapter.
        OssiaError: see `combine`.
    """
    folders = [check_adapter(name) for name in names]
    if len(folders) == 1 and all(weight == 1 for weight in weights):
        yield folders[0]
        return
    with TemporaryDirectory() as made:
        parent = run_of(folders[0])
        if parent is not None:
            shutil.copyfile(parent / CONFIG, Path(made) / CONFIG)
        yield combine(folders, weights or [1.0] * len(folders), Path(made) / "combined")


def take_settings(config: SftConfig, adapter: Path) -> None:
    """Put an adapter's rank, scale and targets into the options of the run that goes on training it: for the plan and
    for people, since the adapter is loaded as its own configuration has it. The rank is the largest of any module.

    Raises:
        UsageError: another value was asked for.
        OssiaError: an adapter that is not trained here.
    """
    from ossia.adapters.deltas import AdapterDeltas, linear_targets

    deltas = AdapterDeltas(adapter)
    settings = deltas.settings
    found = {
        "lora_rank": max(place.rank for place in deltas.places.values()),
        "lora_alpha": settings.alpha,
        "use_rslora": settings.use_rslora,
        "target_modules": linear_targets(deltas) or ["none"],
        "target_experts": _expert_layers(deltas),
    }
    default = SftConfig()
    for name, value in found.items():
        asked = getattr(config, name)
        if asked not in (getattr(default, name), value):
            raise UsageError(f"--{name} {asked}: the adapter in {adapter} has {value}; leave the flag out")
        setattr(config, name, value)


def check_scale(config: SftConfig, checkpoint: Path) -> None:
    """UsageError where a checkpoint's adapter is scaled otherwise than the options say."""
    settings = read_settings(checkpoint)
    there, here = (settings.alpha, settings.use_rslora), (config.lora_alpha, config.use_rslora)
    if there != here:
        raise UsageError(
            f"{checkpoint} was trained with --lora_alpha {there[0]:g} --use_rslora {str(there[1]).lower()}; give these"
        )


def _expert_layers(deltas: AdapterDeltas) -> str:
    """`--target_experts` of an adapter: all, none, or numbers of layers."""
    layers = {int(number) for name, place in deltas.places.items() if place.on_experts
              for number in re.findall(r"\.layers\.(\d+)\.", name)}  # fmt: skip
    if any(re.search(r"layers\.\d+\.", end) for end in deltas.settings.target_parameters):
        return ",".join(map(str, sorted(layers)))
    return "all" if layers else "none"
