"""Starts one process per device where `NPROC_PER_NODE` asks for several, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys

from ossia.errors import OssiaError, UsageError


def processes_wanted() -> int:
    """How many processes are still to be started: `NPROC_PER_NODE`, or 1 inside one that was started already."""
    text = os.environ.get("NPROC_PER_NODE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"NPROC_PER_NODE is {text!r}; a whole number of at least 1 is needed")
    return 1 if "RANK" in os.environ else int(text)


def launch(processes: int) -> None:
    """Run this same command in `processes` processes on this machine and wait; `MASTER_PORT` is used if set.

    Raises:
        OssiaError: a process failed; it has said why itself.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{os.environ.get('MASTER_PORT', '0')}",
        run_id="ossia",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ossia", *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise OssiaError(f"process {rank} of {processes} ended with exit code {failure.exitcode}; see above") from None
