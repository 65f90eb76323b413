"""GPUs for a plan: those that were named, those of this machine, or common ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from ossia.config.base import parse_bytes
from ossia.errors import UsageError
from ossia.train.gpus import COMMON, GPUS, Gpu, check_capability, named, of_device

_SIZE = re.compile(r"\s*[\d.]+\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_CONTEXT = 512 * 2**20
"""What CUDA takes of a GPU in a new process, about."""


@dataclass(frozen=True)
class Place:
    """Where a run may be.

    Args:
        title: what people call it.
        free: bytes.
        gpu: what it can do; None: nobody knows.
    """

    title: str
    free: int
    gpu: Gpu | None


def places(names: list[str]) -> list[Place]:
    """The GPUs that `--gpu` names; UsageError for one that cannot train gpt-oss."""
    return [_named(name) for name in names]


def present() -> list[Place]:
    """This machine's GPUs, one of each kind, with what is free on the emptiest.

    Raises:
        UsageError: only such as cannot train gpt-oss.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = ["name", "memory.free", "compute_cap"]
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: dict[str, Place] = {}
    refused: UsageError | None = None
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields) or not values[1].isdigit():
            continue
        name, free = values[0], int(values[1]) * 2**20 - _CONTEXT
        major, _, minor = values[2].partition(".")
        capability = (int(major), int(minor or 0))
        try:
            check_capability(name, capability)
        except UsageError as error:
            refused = error
            continue
        if name not in found or free > found[name].free:
            found[name] = Place(name, free, of_device(name))
    if refused and not found:
        raise refused
    return list(found.values())


def common() -> list[Place]:
    """GPUs that people ask about."""
    return [Place(gpu.title, gpu.free, gpu) for name in COMMON for gpu in GPUS if gpu.name == name]


def _named(name: str) -> Place:
    if _SIZE.fullmatch(name) and not name.strip().isdigit():
        return Place(f"a GPU with {name.strip()} free", parse_bytes(name, "--gpu"), None)
    gpu = named(name)
    return Place(gpu.title, gpu.free, gpu)
