"""Starts one process per device where `NPROC_PER_NODE` asks for several, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ossia.errors import OssiaError, UsageError
from ossia.threads import allowed_cores

_RUN = "ossia"


def launched_here() -> bool:
    """Whether `launch` started this process, in which case that one has said what concerns all."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN


def processes_wanted() -> int:
    """How many processes are still to be started here: `NPROC_PER_NODE`; 1 inside one that was started already."""
    return 1 if "RANK" in os.environ else _whole_number("NPROC_PER_NODE", "1", 1)


def launch(processes: int) -> None:
    """Run this same command in `processes` processes on this machine and wait.

    Several machines: `NNODES`, `NODE_RANK`, `MASTER_ADDR` and `MASTER_PORT`, as torchrun knows them. SIGTERM and
    Ctrl-C are passed on, so that processes save and end.

    Raises:
        OssiaError: a process failed; it has said why itself.
        KeyboardInterrupt: after Ctrl-C.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // processes)))
    nodes = nodes_wanted()
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "0")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        # As torchrun does: with a rank for each node there is nothing to agree upon.
        rdzv_backend="static" if nodes > 1 else "c10d",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": _whole_number("NODE_RANK", "0", 0), "timeout": 900} if nodes > 1 else {},
        run_id=_RUN,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    with _signals_passed_on() as asked:
        try:
            elastic_launch(config, sys.executable)("-m", "ossia", *sys.argv[1:])
        except ChildFailedError as error:
            if signal.SIGINT not in asked:
                rank, failure = error.get_first_failure()
                raise OssiaError(
                    f"process {rank} of {processes * nodes} ended with exit code {failure.exitcode}; see above"
                ) from None
    if signal.SIGINT in asked:
        raise KeyboardInterrupt


def nodes_wanted() -> int:
    """Machines that are to train together: `NNODES`; 1 inside a process that was started already.

    Raises:
        UsageError: several, and not known which this one is or where the first one is.
    """
    nodes = 1 if "RANK" in os.environ else _whole_number("NNODES", "1", 1)
    if nodes > 1:
        for name, meaning in (
            ("NODE_RANK", "this machine's number, from 0"),
            ("MASTER_ADDR", "the first machine's address"),
            ("MASTER_PORT", "a free port there"),
        ):
            if name not in os.environ:
                raise UsageError(f"NNODES={nodes} needs {name}: {meaning}")
        if _whole_number("NODE_RANK", "0", 0) >= nodes:
            raise UsageError(f"NODE_RANK is {os.environ['NODE_RANK']}; with NNODES={nodes} it goes to {nodes - 1}")
    return nodes


def _whole_number(name: str, default: str, least: int) -> int:
    text = os.environ.get(name, default)
    if not text.isdigit() or int(text) < least:
        raise UsageError(f"{name} is {text!r}; a whole number of at least {least} is needed")
    return int(text)


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Yields the signals that came; each goes to the processes started here, which a terminal's Ctrl-C does not reach:
    the launcher gives each a session of its own."""
    import psutil

    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    with stop_signals_to(pass_on):
        yield asked


@contextmanager
def stop_signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, SIGTERM and SIGINT reach `handler`; in the main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
