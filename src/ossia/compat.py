"""What cannot be avoided of other libraries' behaviour, each with its version and when it can go."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Names of a forward's argument for earlier keys and values: transformers 5.24 renamed the second to the first. The
second goes when the oldest supported transformers has the first."""

UNTESTED_FROM = {"transformers": "5.25", "peft": "0.22", "accelerate": "1.16"}
"""First release of each library that the tests have not seen; pyproject.toml stops there too."""


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


def untested_libraries() -> list[str]:
    """A line for each library that is installed, against what pyproject.toml asks for, in a release newer than any that
    was tested."""
    from packaging.version import Version

    return [
        f"{name} {installed} is newer than what Ossia was tested with: results may be wrong or runs may fail "
        f"(pip install '{name}<{first}')"
        for name, first in UNTESTED_FROM.items()
        if Version(installed := importlib.metadata.version(name)).release >= Version(first).release
    ]


def cache_name(forward: Callable[..., Any]) -> str:
    """Name of the cache argument of a model's forward, and of the cache in its output.

    A model's own code may keep the old name; a forward that names neither (`**kwargs`) takes what the installed
    transformers passes."""
    from transformers.masking_utils import create_causal_mask

    both = (inspect.signature(function).parameters for function in (forward, create_causal_mask))
    return next(name for named in both for name in CACHE_NAMES if name in named)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache, or None, out of a forward's arguments, whatever this transformers calls it.

    Raises:
        TypeError: two caches, one that is not transformers' `Cache`, or what looks like one under a name that is not
            known: passed over, the model would forget all earlier tokens and still answer.
    """
    from transformers.cache_utils import Cache

    found = [value for name in CACHE_NAMES if (value := arguments.pop(name, None)) is not None]
    unknown = [
        name
        for name, value in arguments.items()
        if isinstance(value, Cache) or (value is not None and name != "use_cache" and _sounds_like_a_cache(name))
    ]
    if unknown:
        raise TypeError(f"{unknown[0]}: not a cache argument that is known here ({', '.join(CACHE_NAMES)} are)")
    if len(found) > 1:
        raise TypeError(f"{' and '.join(CACHE_NAMES)} are the same argument: give one of them")
    if found and not isinstance(found[0], Cache):
        raise TypeError(f"a cache is a transformers.Cache here, not {type(found[0]).__name__}")
    return found[0] if found else None


def _sounds_like_a_cache(name: str) -> bool:
    return "cache" in name or name.startswith("past")


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
