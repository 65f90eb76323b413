"""Seconds and host memory of merging a random adapter (r=8, attention and all experts) into a gpt-oss, by format.

python benchmarks/export/run.py --model FOLDER --out FILE.json [--formats mxfp4 bf16] [--device auto]

FOLDER is a checkpoint from benchmarks/train/checkpoint.py. Exports go through `ossia export`, unverified, into a folder
beside --out that is removed after each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from ossia.adapters.files import CONFIG, WEIGHTS
from ossia.adapters.origin import KEY, fingerprint
from ossia.bench.run import measured_on
from ossia.compat import save_tensors
from ossia.model.folder import read_json
from ossia.model.load import pick_device

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")


def random_adapter(base: Path, folder: Path, rank: int = 8) -> None:
    """An adapter in PEFT's layout whose change is about 1 % of the experts' weights."""
    config = read_json(base / "config.json")
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    outputs = {"q_proj": (hidden, heads), "k_proj": (hidden, kv_heads), "v_proj": (hidden, kv_heads),
               "o_proj": (heads, hidden)}  # fmt: skip
    shapes = {}
    for layer in range(config["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}"
        for name, (a, b) in outputs.items():
            shapes[f"{stem}.self_attn.{name}"] = (rank, a), (b, rank)
        shapes[f"{stem}.mlp.experts.base_layer"] = (experts * rank, hidden), (2 * inner, rank * experts)
        shapes[f"{stem}.mlp.experts"] = (experts * rank, inner), (hidden, rank * experts)
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (a, b) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(a, generator=draw) * a[1] ** -0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(b, generator=draw) * 1e-3
    folder.mkdir()
    save_tensors(tensors, folder / WEIGHTS, {KEY: fingerprint(base)})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4 * rank,
                "base_model_name_or_path": str(base), "target_modules": list(LINEAR),
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def export(adapter: Path, output: Path, kind: str, device: str) -> dict[str, object]:
    """One export: seconds of the whole command, the peak of its resident memory, and what it said."""
    command = [sys.executable, "-m", "ossia", "export", "--adapters", adapter, "--merge_lora", "true", "--format", kind,
               "--device", device, "--verify", "false", "--output_dir", output]  # fmt: skip
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(list(map(str, command)), stdout=printed, stderr=subprocess.STDOUT, text=True)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        printed.seek(0)
        lines = printed.read().splitlines()
    if process.wait():
        return {"format": kind, "failed": lines[-1:]}
    written = sum(file.stat().st_size for file in output.iterdir())
    said = [line for line in lines if line.startswith("experts rounded") or " GB merged: " in line]
    return {"format": kind, "seconds": round(seconds, 1), "host_peak_bytes": peak, "written_bytes": written,
            "said": said}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=["mxfp4", "bf16"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as made:
        adapter, output = Path(made) / "adapter", Path(made) / "merged"
        random_adapter(args.model.absolute(), adapter)
        for kind in args.formats:
            results.append(export(adapter, output, kind, args.device))
            print(results[-1], flush=True)
            shutil.rmtree(output, ignore_errors=True)
            environment = measured_on(pick_device(args.device))
            layers = read_json(args.model / "config.json")["num_hidden_layers"]
            text = json.dumps({"environment": environment, "layers": layers, "results": results}, indent=1)
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
