"""Checkpoints on disk: written aside, flushed, sealed by checksums, renamed; a damaged one is known as such.

.checkpoint-N.part   being written; left by a killed run, removed when it goes on
checkpoint-N         whole: `manifest.json` has the SHA-256 of every other file
.checkpoint-N.old    its predecessor while it is replaced, or one on its way out
damaged-checkpoint-N found damaged when a run went on; kept for a look
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
_HIDDEN = re.compile(rf"\.({PREFIX}\d+)\.(part|old)")


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`; -1 where it is called otherwise."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if checkpoint.name.startswith(PREFIX) and number.isdigit() else -1


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints by step, the newest last."""
    found = [path for path in run.glob(f"{PREFIX}*") if step_of(path) >= 0 and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=step_of)


def part_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return checkpoint.with_name(f".{checkpoint.name}.part")


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file to the disk and write the manifest: `facts` and `files`, {name: sha256}."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                files[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush_names(folder)


def put_in_place(checkpoint: Path) -> None:
    """Give the sealed part its name; one of that name makes room first."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    if checkpoint.exists():
        shutil.rmtree(old, ignore_errors=True)
        checkpoint.rename(old)
    part_of(checkpoint).rename(checkpoint)
    _flush_names(checkpoint.parent)
    shutil.rmtree(old, ignore_errors=True)


def manifest(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says; empty where there is none that can be read."""
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("files"), dict) else {}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums; None where it is sound."""
    files = manifest(checkpoint).get("files")
    if files is None:
        return f"{MANIFEST} is missing or cannot be read"
    for name, wanted in files.items():
        try:
            with (checkpoint / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != wanted:
            return f"{name} is not what was written (checksum)"
    return None


def sound_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run, and a line for each newer one that is damaged."""
    lines: list[str] = []
    for path in reversed(checkpoints(run)):
        why = damage(path)
        if why is None:
            return path, lines
        lines.append(f"{path.name} is damaged: {why}")
    return None, lines


def tidy(run: Path, step: int) -> None:
    """Before a run goes on from `step`: remove what was half-written, set aside what is newer (it is damaged)."""
    for path in run.glob(f".{PREFIX}*"):
        match = _HIDDEN.fullmatch(path.name)
        if match and match[2] == "old" and not (run / match[1]).exists():
            path.rename(run / match[1])
        elif match:
            shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints(run):
        if step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints over `keep`; never the newest, never the best."""
    if not keep:
        return
    found = checkpoints(run)
    spared = {found[-1], Path(best) if best else found[-1]} if found else set()
    excess = len(found) - max(keep, len(spared))
    for path in [path for path in found if path not in spared][: max(excess, 0)]:
        gone = path.with_name(f".{path.name}.old")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _flush_names(folder: Path) -> None:
    """Make the names in a folder as lasting as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
