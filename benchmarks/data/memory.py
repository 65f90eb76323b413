"""How much memory a large file takes to prepare: its rows, the time, and the peak of all processes together.

python benchmarks/data/memory.py --model DIR --dataset FILE.jsonl [--rows 2000000] [--out FILE.json]

The file's rows are repeated until there are --rows of them. Memory is sampled ten times a second: resident is the sum
of what each process holds (rss), and own is that without pages shared between them or mapped from files (uss).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from speed import environment

SCRIPT = """
import sys
from pathlib import Path
from ossia.data.prepare import prepare
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template
rows = prepare([sys.argv[2]], load_template(load_tokenizer(Path(sys.argv[1]))))
print("read back", sum(len(rows[i]) for i in range(0, len(rows), 997)))
"""


def repeated(file: Path, rows: int, folder: Path) -> Path:
    """A file of that many rows, each with a number of its own."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            out.write(json.dumps({**lines[number % len(lines)], "number": number}, ensure_ascii=False) + "\n")
    return path


def watch(process: subprocess.Popen[str]) -> dict[str, float]:
    """Peaks in GB until the process ends."""
    peak = {"resident": 0.0, "own": 0.0}
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [parent, *parent.children(recursive=True)]
            held = [member.memory_full_info() for member in family]
        except psutil.Error:
            continue
        now = {"resident": sum(memory.rss for memory in held), "own": sum(memory.uss for memory in held)}
        peak = {name: max(peak[name], now[name] / 1e9) for name in peak}
        time.sleep(0.1)
    return {name: round(value, 3) for name, value in peak.items()}


def main() -> int:
    """Prepare the file, print and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path)
    config = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = repeated(config.dataset, config.rows, Path(folder))
        size = file.stat().st_size
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, config.model, str(file)],
            env={**os.environ, "OSSIA_CACHE": f"{folder}/cache"},
            text=True,
        )
        peak = watch(process)
        seconds = time.perf_counter() - started
    result = {"rows": config.rows, "file_gb": round(size / 1e9, 3), "seconds": round(seconds, 1), "peak_gb": peak}
    print(result)
    if config.out and not process.returncode:
        config.out.write_text(json.dumps({**environment(None), **result}, indent=1) + "\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
