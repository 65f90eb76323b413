"""What cannot be avoided of other libraries' behaviour, each with its version and when it can go."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of what users read; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers 5.23 renames gradient_checkpointing to activation_checkpointing, which 5.17 does not have, and peft
    # 0.21 still uses the old names. Goes when the oldest supported transformers has the new ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # accelerate 1.15 passes DDP an option that torch 2.13 renames; torch 2.11 has the old name alone.
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")
    # deepspeed 0.19 calls collectives by names that torch 2.13 replaces.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """transformers 5.23 draws its GGUF bar into logs too: it asks tqdm itself, past its own switch for bars."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other; safetensors 0.8 lets its owner alone read it."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
