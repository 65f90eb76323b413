"""How fast rows are read, rendered and tokenised, beside ms-swift where its Python is given.

python benchmarks/data/speed.py --model DIR --dataset FILE … [--swift /path/to/venv/bin/python] [--out FILE.json]

Each case is timed from files to tokenised rows on disk, imports and tokenizer loading left out; nothing comes from a
cache. The files are taken --copies times, so that the start of worker processes does not decide. ms-swift runs its own
path with its own gpt-oss template (ms_swift.py); cases of the two alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from ossia.data.prepare import prepare
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template

HERE = Path(__file__).parent


def copies(files: list[str], times: int, folder: Path) -> list[str]:
    """Each file with its rows repeated, as JSON lines."""
    made = []
    for file in map(Path, files):
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        path = folder / f"{file.stem}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * times), encoding="utf-8")
        made.append(str(path))
    return made


def ours(model: str, files: list[str], processes: int) -> tuple[float, int, int]:
    """(seconds, rows, tokens)."""
    template = load_template(load_tokenizer(Path(model)))
    with contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        rows = prepare(files, template, cache=False, processes=processes)
        seconds = time.perf_counter() - started
    return seconds, len(rows), int(rows.lengths.sum())


def swift(python: str, model: str, files: list[str], processes: int, mode: str) -> tuple[float, int, int]:
    """(seconds, rows, tokens) of ms-swift."""
    command = [python, str(HERE / "ms_swift.py"), model, mode, str(processes), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, rows, tokens = json.loads(done.stdout.splitlines()[-1])
    return seconds, rows, tokens


def main() -> None:
    """Time every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--swift", help="a Python that has ms-swift")
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    config = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cases = [("ossia", processes) for processes in config.processes]
    if config.swift:
        cases += [(f"ms-swift {mode}", config.processes[-1]) for mode in ("encode", "lazy")]
    runs: dict[tuple[str, int], list[tuple[float, int, int]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        files = copies(config.dataset, config.copies, Path(folder))
        for _ in range(config.repeat):
            for name, processes in cases:
                if name == "ossia":
                    run = ours(config.model, files, processes)
                else:
                    run = swift(config.swift, config.model, files, processes, name.split()[1])
                runs[name, processes].append(run)
    results = []
    for (name, processes), found in runs.items():
        rates = sorted(rows / seconds for seconds, rows, _ in found)
        results.append(
            {
                "case": name,
                "processes": processes,
                "rows": found[0][1],
                "tokens": found[0][2],
                "seconds": [round(seconds, 3) for seconds, _, _ in found],
                "rows_per_second": {"median": round(median(rates)), "low": round(rates[0]), "high": round(rates[-1])},
            }
        )
        spread = f"({rates[0]:,.0f} to {rates[-1]:,.0f})"
        print(f"{name:16} {processes} processes  {found[0][1]:7,} rows  {median(rates):8,.0f} rows/s  {spread}")
    if config.out:
        config.out.write_text(json.dumps({**environment(config.swift), "results": results}, indent=1) + "\n")


def environment(swift_python: str | None) -> dict[str, object]:
    """Where and with what this was measured."""
    import platform
    from importlib.metadata import version

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git.stdout.strip(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "pyarrow")},
    }
    if swift_python:
        names = ("ms-swift", "tokenizers", "transformers", "datasets")
        code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
        found["swift_versions"] = json.loads(subprocess.check_output([swift_python, "-c", code], text=True))
    return found


if __name__ == "__main__":
    sys.exit(main())
