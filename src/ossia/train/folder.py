"""The run's folder: resolved options, metrics, checkpoints, `last` and `best`."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from ossia.config import SftConfig
from ossia.config.base import read_yaml
from ossia.errors import UsageError
from ossia.track.files import write_aside

CONFIG = "config.yaml"


def new_run_folder(output_dir: str, add_version: bool) -> Path:
    """Make and return `output_dir/vN-<time>/`, or `output_dir` itself where no version is wanted."""
    parent = Path(output_dir).expanduser().resolve()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not add_version:
            return parent
        while True:
            number = max((number for number, _ in numbered_runs(parent)), default=-1) + 1
            folder = parent / f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"
            # Another run may have begun in the same moment.
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from error


def numbered_runs(parent: Path) -> list[tuple[int, Path]]:
    """(N, folder) of each `vN-…` in a folder, in no order."""
    return [(int(match[1]), path) for path in parent.iterdir() if (match := re.match(r"v(\d+)-", path.name))]


def point(run: Path, name: str, target: str | None) -> None:
    """Make the link `run/name` → the checkpoint folder `target`, in one step."""
    if target is None or not Path(target).is_dir():
        return
    link, part = run / name, run / f".{name}.part"
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, run), target_is_directory=True)
    os.replace(part, link)


def save_options(run: Path, config: SftConfig) -> None:
    """Write a run's resolved options, whole or not at all."""
    write_aside(run / CONFIG, config.to_yaml())


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, if its options are there."""
    parent = checkpoint.parent
    return parent if (parent / CONFIG).is_file() else None


def options_of(run: Path) -> SftConfig:
    """The resolved options of a run."""
    return SftConfig.from_dict(read_yaml(str(run / CONFIG)), origin=str(run / CONFIG))
