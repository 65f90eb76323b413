"""Where Ossia keeps what it can make again: tokenised rows, built models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$OSSIA_CACHE, else $XDG_CACHE_HOME/ossia, else ~/.cache/ossia."""
    if own := os.environ.get("OSSIA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ossia"
