"""The direction of imports, and what the command line may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import ossia

ROOT = Path(ossia.__file__).parent
ORDER = [
    "errors",
    "compat",
    "threads",
    "console",
    "cache",
    "web",
    "config",
    "template",
    "kernels",
    "model",
    "data",
    "adapters",
    "track",
    "board",
    "train",
    "bench",
    "plan",
    "infer",
    "serve",
    "export",
    "demo",
    "cli",
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        found |= {name.split(".")[1] for name in names if name.startswith("ossia.")}
    return found


def test_folders_import_only_from_above():
    wrong = []
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        allowed = set(ORDER[: ORDER.index(part) + 1]) - (
            {"errors", "compat", "threads", "console", "config", "template"} if part == "kernels" else set()
        )
        wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in imports(file) - allowed]
    assert not wrong


def test_help_is_quick_and_loads_no_torch():
    for argv in (["--help"], ["sft", "--help"]):
        script = f"import sys; from ossia.cli import main\ntry: main({argv})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        best = 9.0
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
            best = min(best, time.perf_counter() - started)
        assert best < 0.5, f"ossia {' '.join(argv)} took {best:.2f} s"
