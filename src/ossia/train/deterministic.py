"""`--deterministic true`: the same numbers from the same run; what cannot give them is named."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ossia.console import say


def before_cuda() -> None:
    """cuBLAS reads this once, when CUDA starts: a workspace of fixed size for every stream."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic() -> Iterator[None]:
    """torch takes deterministic algorithms; an operation without one goes on, and is said once."""
    import torch

    said: set[str] = set()
    show = warnings.showwarning

    def name(message: Warning | str, *rest: Any, **named: Any) -> None:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(message))
        if not found:
            show(message, *rest, **named)
        elif found[1] not in said:
            said.add(found[1])
            say(f"--deterministic: {found[1]} has no deterministic form here; its results may differ in the last bits")

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".*does not have a deterministic implementation")
            warnings.showwarning = name
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
