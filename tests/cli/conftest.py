"""Runs the command as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


class Ossia:
    """`ossia(...)` returns the finished process; output is text."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def __call__(
        self, *args: object, stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("SWANLAB")}
        return subprocess.run(
            [sys.executable, "-m", "ossia", *map(str, args)],
            cwd=self.cwd,
            input=stdin,
            env={**variables, "HF_HUB_OFFLINE": "1", "OSSIA_CACHE": str(self.cwd.parent / "cache"), **(env or {})},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def ok(self, *args: object, **kwargs) -> str:
        """Standard output of a command that must succeed."""
        done = self(*args, **kwargs)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture
def ossia(tmp_path) -> Ossia:
    """The command, in an empty folder."""
    return Ossia(tmp_path)
