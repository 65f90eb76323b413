"""Files of a run's folder that others read while it goes on: each is whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RUN = "run.json"


def note(run: Path, **facts: Any) -> None:
    """Keep facts of a run in its `run.json`: `status`, as trackers know it or `running`, and `run_ids`, what trackers
    call it; besides what the report tells of it."""
    text = json.dumps({**facts_of(run), **facts}, indent=1, ensure_ascii=False, default=str)
    write_aside(run / RUN, text + "\n")


def facts_of(run: Path) -> dict[str, Any]:
    """What was noted of a run."""
    return json_of(run / RUN) or {}


def json_of(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all; halves of surrogate pairs, which a file can't hold, become `?`."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)
