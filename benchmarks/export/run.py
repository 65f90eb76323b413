"""Seconds and memory of merging a random adapter (r=8, attention and all experts) into a gpt-oss, case by case.

python benchmarks/export/run.py --model FOLDER [FOLDER ...] --out FILE.json [--cases mxfp4 bf16 "mxfp4 calibrated"]
    [--device auto] [--quant_n_samples 128] [--max_length 512]

FOLDER is a checkpoint from benchmarks/train/checkpoint.py, of any size and number of layers. Exports go through
`ossia export`, unverified, into a folder beside --out that is removed after each. Calibrated ones read rows of random
words, each as long as --max_length at least. Results are written after each case.
"""

from __future__ import annotations

import argparse
import json
import random
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
FORMATS = ("mxfp4", "bf16", "gguf")
CALIBRATED = " calibrated"
CASES = (*FORMATS, f"mxfp4{CALIBRATED}", f"gguf{CALIBRATED}")
SAID = (" GB merged: ", "calibrated on ", "experts rounded", "on the calibration's inputs")


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


def random_rows(file: Path, count: int, length: int) -> None:
    """Conversations of random words of two syllables, at least `length` tokens each."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]

    def words(number: int) -> str:
        return " ".join(draw.choice(syllables) + draw.choice(syllables) for _ in range(number))

    with file.open("w", encoding="utf-8") as rows:
        for _ in range(count):
            turns = {"role": "user", "content": words(length // 4)}, {"role": "assistant", "content": words(length)}
            rows.write(json.dumps({"messages": turns}) + "\n")


def export(command: list[object], case: str, output: Path, gpu: bool) -> dict[str, object]:
    """One export: seconds of the whole command, the peak of its resident memory and of the GPU's, what it said."""
    used = device_bytes() if gpu else 0
    started, peak, device_peak = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(list(map(str, command)), stdout=printed, stderr=subprocess.STDOUT, text=True)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            if gpu:
                device_peak = max(device_peak, device_bytes() - used)
            time.sleep(0.1)
        status, seconds = process.wait(), time.perf_counter() - started
        printed.seek(0)
        lines = printed.read().splitlines()
    result: dict[str, object] = {"format": case.removesuffix(CALIBRATED), "seconds": round(seconds, 1)}
    result |= {"host_peak_bytes": peak} | ({"device_peak_bytes": device_peak} if gpu else {})
    if status:
        return result | {"failed": lines[-1:]}
    written = sum(file.stat().st_size for file in output.iterdir())
    return result | {"written_bytes": written, "said": [line for line in lines if any(map(line.__contains__, SAID))]}


def device_bytes() -> int:
    """Of the GPU, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["mxfp4", "bf16"], choices=CASES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quant_n_samples", type=int, default=128)
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    results: list[dict[str, object]] = []
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as made:
        adapter, output, rows = (Path(made) / name for name in ("adapter", "merged", "rows.jsonl"))
        random_rows(rows, args.quant_n_samples, args.max_length)
        for model in args.model:
            config = read_json(model / "config.json")
            shutil.rmtree(adapter, ignore_errors=True)
            random_adapter(model.absolute(), adapter)
            for case in args.cases:
                command: list[object] = [sys.executable, "-m", "ossia", "export", "--adapters", adapter]
                command += ["--merge_lora", "true", "--format", case.removesuffix(CALIBRATED), "--verify", "false"]
                command += ["--device", args.device, "--output_dir", output]
                result = {"layers": config["num_hidden_layers"], "experts": config["num_local_experts"]}
                if case.endswith(CALIBRATED):
                    result |= {"quant_n_samples": args.quant_n_samples, "max_length": args.max_length}
                    command += ["--calibrate", "true", "--dataset", rows, "--quant_n_samples", args.quant_n_samples]
                    command += ["--max_length", args.max_length]
                results.append(result | export(command, case, output, device.type == "cuda"))
                print(results[-1], flush=True)
                shutil.rmtree(output, ignore_errors=True)
                text = json.dumps({"environment": measured_on(device), "results": results}, indent=1)
                args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
