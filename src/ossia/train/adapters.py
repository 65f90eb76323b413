"""The adapter that `--adapters` and `--adapter_weights` mean, and a run that goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ossia.adapters.combine import combine
from ossia.adapters.files import check_adapter, read_settings
from ossia.adapters.targets import named_targets
from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.train.folder import CONFIG, run_of


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
    """Put an adapter's rank, scale and targets into the options of the run that goes on training it.

    Raises:
        UsageError: another value was asked for.
        OssiaError: an adapter that is not trained here.
    """
    settings = read_settings(adapter)
    modules, experts = named_targets(settings, adapter)
    found = {
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.use_rslora,
        "target_modules": modules,
        "target_experts": experts,
    }
    default = SftConfig()
    for name, value in found.items():
        asked = getattr(config, name)
        if asked not in (getattr(default, name), value):
            raise UsageError(f"--{name} {asked}: the adapter in {adapter} has {value}; leave the flag out")
        setattr(config, name, value)
