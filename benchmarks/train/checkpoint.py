"""Writes gpt-oss with random weights to a folder, in the layout of openai/gpt-oss-20b.

python benchmarks/train/checkpoint.py FOLDER --tokenizer DIR [--size 20b] [--layers N] [--router 0.02]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from ossia.bench.model import config_of, random_model
from ossia.compat import save_tensors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with gpt-oss's tokenizer and config.json")
    parser.add_argument("--size", default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--router", type=float, default=0.02, help="deviation of the routers' weights")
    args = parser.parse_args()
    config = config_of(args.size)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    args.folder.mkdir(parents=True)
    for file in args.tokenizer.iterdir():
        if file.is_file():
            shutil.copy(file, args.folder)
    values = json.loads((args.tokenizer / "config.json").read_text(encoding="utf-8"))
    values |= {key: getattr(config, key) for key in ("num_hidden_layers", "num_local_experts", "layer_types")}
    (args.folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    model = random_model(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("model.rotary"):
            continue
        if ".router." in name:
            tensor = (tensor * (args.router / 0.02)).bfloat16()
        shard = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(shard, {})[name] = tensor.cpu()
    index = {}
    for shard, tensors in shards.items():
        save_tensors(tensors, args.folder / f"model-{shard}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (args.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
