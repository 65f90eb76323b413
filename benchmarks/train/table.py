"""Tables of benchmarks/train/results, as Markdown; writes the README's, and the rates that `ossia plan` goes by.

python benchmarks/train/table.py             prints every file's table
python benchmarks/train/table.py --estimates prints what `ossia plan` would say of each case, had it only the others
python benchmarks/train/table.py --write     puts the newest into README.md and README.zh.md, between their marks, and
                                             into src/ossia/plan/rates.json; a case that the newest file has not comes
                                             from the newest that has it, and a mark tells
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
RATES = ROOT / "src" / "ossia" / "plan" / "rates.json"
FILES = ("h100-9.json", "h100-10.json", "h100-8.json", "h100-7.json")
NEWEST = FILES[0]
_MARKS_OF_FILES = ("", "¹", "²", "³")
_NAMES = {
    "tutorial": "transformers + PEFT",
    "unsloth": "Unsloth {unsloth}, 16 bit",
    "before": "Ossia at {commit}",
    "ossia sft": "Ossia",
    "ossia bench": "Ossia, gpt-oss-{size}",
}
_HEADS = {
    "README.md": ("batch × tokens", "tokens/s (slowest to fastest)", "peak memory"),
    "README.zh.md": ("批 × token", "token/秒(最慢至最快)", "显存峰值"),
}
_MARKS = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.DOTALL)


def table(files: Sequence[Path], heads: tuple[str, str, str], without: str = "") -> str:
    """Results, a row each, but for the program `without`: the first file's; marked, what only those after it have."""
    lines = [f"| | {' | '.join(heads)} |", "|---|---|---|---|"]
    found = _found(files)
    results = [(result, mark) for data, mark in zip(found, _MARKS_OF_FILES, strict=False) for result in data["results"]]
    results = [(result, mark) for result, mark in results if result["program"] != without]
    for result, mark in sorted(results, key=lambda pair: _place(pair[0])):
        name = _NAMES[result["program"]].format(**{**result, **result.get("versions", {})})
        extra = "" if "size" in result else result["case"].removeprefix("tutorial ").partition(" ")[2]
        batch = f"{result['batch']} × {result.get('length', 0):,}"
        if is_tutorial(result):
            batch = f"{result['batch']} × {result['accumulated']} short rows"
            extra = extra or ("evaluation" if "evaluation" in result["case"] else "")
        if "failed" in result:
            lines.append(f"| {name}{f', {extra}' if extra else ''} | {batch} | failed | |")
            continue
        rate = f"{result['tokens_per_second']:,} ({result['slowest']:,} to {result['fastest']:,})"
        peak = f"{result['peak_bytes'] / 1e9:.1f} GB"
        lines.append(f"| {name}{f', {extra}' if extra else ''}{mark} | {batch} | {rate} | {peak} |")
    for data, mark in zip(found, _MARKS_OF_FILES, strict=False):
        if data["results"]:
            lines += ["", f"{mark} {_where(data['environment'])}".strip()]
    return "\n".join(lines) + "\n"


def is_tutorial(result: dict[str, Any]) -> bool:
    """Whether a case takes the tutorial's rows, instead of rows of one length."""
    return str(result["case"]).startswith("tutorial")


def _where(environment: dict[str, Any]) -> str:
    versions = f"torch {environment['torch']}, transformers {environment['transformers']}"
    return f"{environment['device']}, {versions}, {environment['date']}, commit {environment['commit']}."


def _found(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Each file's content, with those cases alone that no file before it has."""
    known: set[tuple[str, str]] = set()
    found = []
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        results = [result for result in data["results"] if (result["program"], result["case"]) not in known]
        known |= {(result["program"], result["case"]) for result in results}
        found.append({**data, "results": results})
    return found


def _place(result: dict[str, Any]) -> tuple[Any, ...]:
    """The tutorial's cases come first, in the order of their file."""
    if is_tutorial(result):
        return (0, 0, 0)
    return (result["length"], result["batch"], list(_NAMES).index(result["program"]))


def written(readme: str) -> str:
    """A README's text with the newest table in it."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    made = table([RESULTS / file for file in FILES], _HEADS[readme], without="before")
    return _MARKS.sub(lambda marks: marks[1] + made + marks[2], text)


def rates() -> str:
    """`ossia plan`'s file: Ossia's cases of the README's table."""
    found = _found([RESULTS / file for file in FILES])
    entries = [_rate(result, data["environment"]) for data in found for result in data["results"]]
    return json.dumps([entry for entry in entries if entry], indent=1, ensure_ascii=False) + "\n"


def _rate(result: dict[str, Any], where: dict[str, Any]) -> dict[str, Any] | None:
    # How long the rows of a packed sequence are is not written down; work depends on it. What the tutorial's rows take
    # is the host's for a good part.
    uneven = "--packing" in result.get("flags", []) or is_tutorial(result)
    if not result["program"].startswith("ossia") or "failed" in result or uneven:
        return None
    flags = ["--per_device_train_batch_size", str(result["batch"]), "--max_length", str(result["length"])]
    for name in ("gradient_checkpointing", "memory_budget") if result["program"] == "ossia bench" else ():
        flags += [f"--{name}", str(result[name])]
    return {
        "case": f"{result['batch']} × {result['length']:,}",
        "size": result.get("size", "20b"),
        "flags": [*flags, *result.get("flags", [])],
        "device": where["device"],
        "commit": result.get("commit", where["commit"]),
        "date": where["date"],
        "tokens_per_second": result["tokens_per_second"],
    }


def estimates() -> list[str]:
    """Each case's rate as measured, and as estimated from the others."""
    from ossia.plan.rates import measured, rate

    lines = ["| size | batch × tokens | layers made again | tokens/s | estimated | |", "|---|---|---|---|---|---|"]
    for case in measured():
        others = [other for other in measured() if other is not case]
        found, tokens = rate(case.plan, case.model, case.gpu, case.length, others), case.plan.sizes.tokens
        if found is not None:
            guess = tokens / found.seconds(tokens, case.length)
            about = f"{case.tokens_per_second:,} | {guess:,.0f} | {guess / case.tokens_per_second - 1:+.0%} |"
            lines.append(f"| {case.size} | {case.case} | {case.plan.recompute.count('layer')} | {about}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--estimates", action="store_true")
    args = parser.parse_args()
    if args.estimates:
        print("\n".join(estimates()))
        return
    if args.write:
        for readme in _HEADS:
            (ROOT / readme).write_text(written(readme), encoding="utf-8")
        RATES.write_text(rates(), encoding="utf-8")
        return
    for file in sorted(RESULTS.glob("*.json")):
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        print(f"{file.name}: {data.get('note', '')}\n\n{table([file], _HEADS['README.md'])}")


if __name__ == "__main__":
    main()
