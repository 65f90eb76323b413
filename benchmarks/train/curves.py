"""Loss curves of the fast path in bfloat16 and of the reference path in float32: same rows, same order, same adapters.

python benchmarks/train/curves.py --model FOLDER --dataset FILE --out FILE.json [--steps 200]

FOLDER is a pretrained model in gpt-oss's layout (the demo's base: `ossia demo` builds it). Both runs go through
`ossia sft`. A third run, fast again with another seed for the order of rows, shows how far apart two fine runs lie.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ossia.bench.run import measured_on
from ossia.model.load import pick_device

RUNS = {
    "fast": ["--torch_dtype", "auto", "--seed", "42"],
    "reference": ["--torch_dtype", "float32", "--attn_impl", "eager", "--seed", "42"],
    "fast, other order": ["--torch_dtype", "auto", "--seed", "43"],
}


def losses(model: str, dataset: str, steps: int, flags: list[str], folder: Path) -> list[float]:
    """Loss of each step."""
    command = [sys.executable, "-m", "ossia", "sft", "--model", model, "--dataset", dataset, "--max_steps", str(steps),
               "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no", "--output_dir",
               str(folder), "--add_version", "false", *flags]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def apart(one: list[float], other: list[float]) -> dict[str, float]:
    """Mean and largest distance, and that of the means over the last quarter."""
    distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
    quarter = len(one) // 4
    ends = abs(statistics.fmean(one[-quarter:]) - statistics.fmean(other[-quarter:]))
    return {"mean": statistics.fmean(distances), "largest": max(distances), "last_quarter": ends}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        curves = {
            name: losses(args.model, args.dataset, args.steps, flags, Path(made) / str(number))
            for number, (name, flags) in enumerate(RUNS.items())
        }
    result = {
        "environment": measured_on(pick_device("auto")),
        "apart": {name: apart(curves["fast"], curve) for name, curve in curves.items() if name != "fast"},
        "curves": curves,
    }
    print(json.dumps(result["apart"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
