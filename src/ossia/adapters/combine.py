"""Several adapters of one base as one: ranks side by side, so that its change is the weighted sum of theirs, exactly.

E experts, r rank, O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ossia.adapters.files import CONFIG, WEIGHTS, read_weights
from ossia.errors import OssiaError
from ossia.model.folder import read_json
from ossia.model.names import PROJECTIONS

PARTS = "combined.json"
"""In a combined adapter's folder: names and weights of its parts."""
_OWN = ("use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields of a part that are not the sum's."""


def combine(folders: Sequence[Path], weights: Sequence[float], output: Path) -> Path:
    """Write the adapter that changes a weight by the weighted sum of what the given ones do, in PEFT's layout.

    Raises:
        OssiaError: damaged files, adapters of different bases, or one that is more than LoRA.
    """
    import torch

    from ossia.adapters.deltas import AdapterDeltas, linear_targets
    from ossia.adapters.origin import KEY, origin_of
    from ossia.compat import save_tensors

    origins = {origin: folder for folder in folders if (origin := origin_of(folder)) is not None}
    if len(origins) > 1:
        first, second = list(origins.values())[:2]
        raise OssiaError(f"--adapters: {first} and {second} were trained on different base models")
    parts = [AdapterDeltas(folder) for folder in folders]
    held = [read_weights(folder) for folder in folders]
    names = sorted({name for part in parts for name in part.places})
    for part in parts:
        if absent := [name for name in names if name not in part.places and part.targets(name)]:
            raise part.lacks(absent[0])
    ranks = {name: sum(part.places[name].rank for part in parts if name in part.places) for name in names}
    rank = max(ranks.values())
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        sides_a, sides_b, shapes = [], [], set()
        for part, each, weight in zip(parts, held, weights, strict=True):
            if (place := part.places.get(name)) is None:
                continue
            a, b = each[place.lora_a].float(), each[place.lora_b].float() * (weight * place.scaling)
            shapes.add((a.shape[1], b.shape[0], a.shape[0] // place.rank))
            sides_a.append(a.view(-1, place.rank, a.shape[1]))
            sides_b.append(b.view(b.shape[0], place.rank, -1))
        if len(shapes) > 1:
            raise OssiaError(f"--adapters: {folders[0]} and others are of different base models ({name} differs)")
        inputs, outputs, experts = shapes.pop()
        # PEFT has one rank for all: what is missing is zeros.
        sides_a.append(torch.zeros(experts, rank - ranks[name], inputs))
        sides_b.append(torch.zeros(outputs, rank - ranks[name], experts))
        module, _, projection = name.rpartition(".")
        nested = projection == PROJECTIONS[0] and f"{module}.{PROJECTIONS[1]}" in names
        prefix = f"base_model.model.{module}{'.base_layer' if nested else ''}"
        tensors[f"{prefix}.lora_A.weight"] = torch.cat(sides_a, 1).reshape(-1, inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.cat(sides_b, 1).reshape(outputs, -1)
    plain = {key: values for key, values in read_json(folders[0] / CONFIG).items() if key not in _OWN}
    config = plain | {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({end for part in parts for end in linear_targets(part)}),
        "target_parameters": sorted({end for part in parts for end in part.settings.target_parameters}) or None,
    }
    output.mkdir()
    (output / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    told = [{"name": folder.name, "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    (output / PARTS).write_text(json.dumps(told) + "\n", encoding="utf-8")
    save_tensors(tensors, output / WEIGHTS, {KEY: next(iter(origins))} if origins else None)
    return output
