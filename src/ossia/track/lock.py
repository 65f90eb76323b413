"""Which process trains in a run's folder: a lock that ends with the process, however it ends.

A POSIX record lock: processes that a run starts have no part in it, and other machines see it where their file system
shares locks.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from ossia.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: nothing is known of other processes
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_SOMEBODY = "another process"
_TRIES, _PAUSE_S = 20, 0.05


def hold(run: Path) -> IO[str]:
    """Take a run's folder for this process, until what is returned closes.

    Raises:
        UsageError: another process has it, or the folder cannot be written.
    """
    try:
        file = (run / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{run}: cannot be written ({error.strerror})") from error
    # `holder` of another process has it too, for a moment.
    for _ in range(_TRIES):
        if _lock(file, exclusive=True) is not False:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        time.sleep(_PAUSE_S)
    file.close()
    raise held(run, holder(run) or _SOMEBODY)


def held(run: Path, process: str) -> UsageError:
    """What to say of a run that another process holds."""
    return UsageError(f"{run}: {process} trains there; wait for its end, or stop it")


def holder(run: Path) -> str | None:
    """Who trains in a folder, `process 17 on host`; "" where nobody does; None where it cannot be known: the run is of
    another program, or the file system has no locks. Not for the process that holds it, which it would free."""
    with suppress(OSError), (run / LOCK).open(encoding="utf-8") as file:
        free = _lock(file, exclusive=False)
        return None if free is None else "" if free else file.read().strip() or _SOMEBODY
    return None


def _lock(file: IO[str], exclusive: bool) -> bool | None:
    """Whether the lock was free, and is now this process's; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
