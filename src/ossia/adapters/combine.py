"""Several adapters of one base as one: ranks side by side, so that its change is the weighted sum of theirs, exactly.

E experts, r rank, O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ossia.adapters.files import CONFIG, WEIGHTS, read_settings, read_weights
from ossia.adapters.targets import named_targets
from ossia.errors import OssiaError
from ossia.model.folder import read_json

PARTS = "combined.json"
"""In a combined adapter's folder: names and weights of its parts."""


def combine(folders: Sequence[Path], weights: Sequence[float], output: Path) -> Path:
    """Write the adapter that changes a weight by the weighted sum of what the given ones do, in PEFT's layout.

    Raises:
        OssiaError: damaged files, adapters of different bases, or one that is more than LoRA on whole modules.
    """
    import torch

    from ossia.adapters.origin import KEY, origin_of
    from ossia.compat import save_tensors

    origins = {origin: folder for folder in folders if (origin := origin_of(folder)) is not None}
    if len(origins) > 1:
        first, second = list(origins.values())[:2]
        raise OssiaError(f"--adapters: {first} and {second} were trained on different base models")
    settings = [read_settings(folder) for folder in folders]
    for folder, setting in zip(folders, settings, strict=True):
        named_targets(setting, folder)
    held = [read_weights(folder) for folder in folders]
    tensors: dict[str, torch.Tensor] = {}
    modules = sorted({name.removesuffix(".lora_A.weight") for each in held for name in each if ".lora_A." in name})
    for module in modules:
        sides_a, sides_b = [], []
        a_name, b_name = (f"{module}.lora_{side}.weight" for side in "AB")
        shapes = {(e[a_name].shape[1], e[b_name].shape[0], e[a_name].shape[0] // s.rank)
                  for e, s in zip(held, settings, strict=True) if a_name in e}  # fmt: skip
        if len(shapes) > 1:
            raise OssiaError(f"--adapters: {folders[0]} and others are of different base models ({module} differs)")
        inputs, outputs, experts = shapes.pop()
        for each, setting, weight in zip(held, settings, weights, strict=True):
            if a_name in each:
                a, b = each[a_name].float(), each[b_name].float() * (weight * setting.scaling)
            else:
                a = torch.zeros(experts * setting.rank, inputs)
                b = torch.zeros(outputs, setting.rank * experts)
            sides_a.append(a.view(experts, setting.rank, inputs))
            sides_b.append(b.view(outputs, setting.rank, experts))
        tensors[a_name] = torch.cat(sides_a, 1).reshape(-1, inputs)
        tensors[b_name] = torch.cat(sides_b, 1).reshape(outputs, -1)
    rank = sum(setting.rank for setting in settings)
    names = {key: sorted({name for s in settings for name in getattr(s, key)}) or None
             for key in ("target_modules", "target_parameters")}  # fmt: skip
    config = read_json(folders[0] / CONFIG) | names | {"r": rank, "lora_alpha": rank, "use_rslora": False}
    output.mkdir()
    (output / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parts = [{"name": folder.name, "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    (output / PARTS).write_text(json.dumps(parts) + "\n", encoding="utf-8")
    save_tensors(tensors, output / WEIGHTS, {KEY: next(iter(origins))} if origins else None)
    return output
