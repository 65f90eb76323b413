"""Tables of benchmarks/train/results, as Markdown; writes the README's.

python benchmarks/train/table.py             prints every file's table
python benchmarks/train/table.py --write     puts the newest into README.md and README.zh.md, between their marks
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NEWEST = "h100-7.json"
_NAMES = {
    "tutorial": "transformers + PEFT",
    "unsloth": "Unsloth {unsloth}, 16 bit",
    "ossia sft": "Ossia",
    "ossia bench": "Ossia, gpt-oss-{size}",
}
_HEADS = {
    "README.md": ("batch × tokens", "tokens/s (slowest to fastest)", "peak memory"),
    "README.zh.md": ("批 × token", "token/秒(最慢至最快)", "显存峰值"),
}
_MARKS = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.DOTALL)


def table(file: Path, heads: tuple[str, str, str]) -> str:
    """One file's results, a row each."""
    data = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"| | {' | '.join(heads)} |", "|---|---|---|---|"]
    for result in sorted(data["results"], key=lambda r: (r["length"], r["batch"], _order(r["program"]))):
        name = _NAMES[result["program"]].format(**{**result, **result.get("versions", {})})
        extra = "" if "size" in result else result["case"].partition(" ")[2]
        batch = f"{result['batch']} × {result['length']:,}"
        if "failed" in result:
            lines.append(f"| {name}{f', {extra}' if extra else ''} | {batch} | failed | |")
            continue
        rate = f"{result['tokens_per_second']:,} ({result['slowest']:,} to {result['fastest']:,})"
        peak = f"{result['peak_bytes'] / 1e9:.1f} GB"
        lines.append(f"| {name}{f', {extra}' if extra else ''} | {batch} | {rate} | {peak} |")
    where = data["environment"]
    versions = f"torch {where['torch']}, transformers {where['transformers']}"
    lines += ["", f"{where['device']}, {versions}, {where['date']}, commit {where['commit']}."]
    return "\n".join(lines) + "\n"


def _order(program: str) -> int:
    return list(_NAMES).index(program)


def written(readme: str) -> str:
    """A README's text with the newest table in it."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    made = table(RESULTS / NEWEST, _HEADS[readme])
    return _MARKS.sub(lambda marks: marks[1] + made + marks[2], text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        for readme in _HEADS:
            (ROOT / readme).write_text(written(readme), encoding="utf-8")
        return
    for file in sorted(RESULTS.glob("*.json")):
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        print(f"{file.name}: {data.get('note', '')}\n\n{table(file, _HEADS['README.md'])}")


if __name__ == "__main__":
    main()
