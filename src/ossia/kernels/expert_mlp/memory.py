"""What the fused path holds between forward and backward; imports nothing that needs a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Memory:
    """What to hold: `keep` the first projection's output from forward to backward, or make it again there; `experts`
    expanded at a time (0: all at once, which alone never makes the host wait for the GPU); `reuse`: where backward
    makes the first projection again, its expanded weight stays for the gradient (not with `experts`)."""

    keep: bool = True
    experts: int = 0
    reuse: bool = False


_state = threading.local()


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Inside, a forward makes only what its backward needs; what it returns is not filled."""
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = False


def is_recomputing() -> bool:
    """Whether this thread is inside `recomputing`."""
    return getattr(_state, "recomputing", False)
