"""Number of CPU threads and how they wait; set before torch is imported, whose OpenMP reads it once."""

from __future__ import annotations

import math
import os
from pathlib import Path

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""By any of these a user chooses how OpenMP's threads wait: the standard's, GNU's (in torch for Linux), LLVM's and
Intel's (in torch for macOS and Windows)."""


def share_cores() -> None:
    """Set the environment of this process and of those that it starts; what is set already stays.

    Threads that have nothing to do sleep instead of spinning until there is work again: where other programs have the
    cores, what spins keeps the thread that has the work from running. Two threads on two cores at a load of 8 decoded
    61 tokens/s asleep and 3 with GNU's default, at 12 against 131 ms of cores' time a token; a short spin
    (GOMP_SPINCOUNT 2000) gave 21 (`benchmarks/threads/results/cpu-1.json`). On a GPU next to nothing is these threads'.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # OpenMP sees by itself which cores a process may run on, but not a container's quota of their time. Processes that
    # train together share it (`ossia.train.launch`).
    if allowed_cores() < _cores_to_run_on() and "NPROC_PER_NODE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cores()))


def allowed_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may keep busy: those that it may run on, or fewer where a container has a quota of time,
    rounded up."""
    quotas = [quota for quota in (_quota_v2(cgroups, own), _quota_v1(cgroups)) if quota]
    return max(1, min([_cores_to_run_on(), *map(math.ceil, quotas)]))


def _cores_to_run_on() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota_v2(cgroups: Path, own: Path) -> float | None:
    """CPU quota in cores (cgroup v2): the least of this process's group and those above it; None without one."""
    path = next((line[3:] for line in _text(own).splitlines() if line.startswith("0::")), "/")
    group, found = cgroups / path.strip("/"), []
    while group != cgroups.parent and cgroups in (group, *group.parents):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            found.append(int(quota) / int(period))
        group = group.parent
    return min(found, default=None)


def _quota_v1(cgroups: Path) -> float | None:
    quota, period = (_text(cgroups / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
