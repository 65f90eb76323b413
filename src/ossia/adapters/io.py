"""Adapters on disk, in PEFT's layout, so that stock PEFT loads ours and we load its.

PEFT's `target_parameters` packs an expert projection as `lora_A` [E·r, in] (expert-major) and `lora_B` [out, r·E]
(expert-minor), and nests the second projection around the first: gate_up under `experts.base_layer.`, down under
`experts.`; a projection targeted alone is under `experts.` (peft 0.21, `ParamWrapper.get_delta_weight`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ossia.adapters.deltas import AdapterDeltas
from ossia.adapters.experts import ExpertsLora
from ossia.adapters.files import CONFIG, WEIGHTS, read_weights
from ossia.adapters.inject import inject
from ossia.adapters.origin import KEY, fingerprint
from ossia.compat import save_tensors
from ossia.console import counted
from ossia.errors import OssiaError
from ossia.model.experts import Experts
from ossia.model.names import PROJECTIONS, Projection

_NEST = {"gate_up_proj": ".base_layer", "down_proj": ""}


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_model: str | None = None,
    adapter: str = "default",
    origin: str | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: from `add_lora` or `load_adapter`.
        folder: made where missing.
        base_model: path or hub id written into the configuration; default: as it stands there.
        adapter: PEFT's name of the adapter.
        origin: fingerprint of the base (see `ossia.adapters.origin`); default: that of `base_model`, where it is a
            folder.
        tensors: from `adapter_tensors`; default: taken here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    if origin is None and base_model is not None and Path(base_model).is_dir():
        origin = fingerprint(Path(base_model))
    save_tensors(tensors or adapter_tensors(model, adapter), part, {KEY: origin} if origin else None)
    config = _config_on_disk(model, base_model, adapter)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / WEIGHTS)


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors by their names on disk, on the CPU; of a model that FSDP shards, on all processes."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLora) and adapter in module.r:
            for projection, prefix in _held(name, module, adapter):
                a_EIR = whole_tensor(getattr(module, f"lora_A_{projection}")[adapter])
                b_ERO = whole_tensor(getattr(module, f"lora_B_{projection}")[adapter])
                tensors[f"{prefix}.lora_A.weight"] = a_EIR.transpose(1, 2).reshape(-1, a_EIR.shape[1])
                tensors[f"{prefix}.lora_B.weight"] = b_ERO.permute(2, 1, 0).reshape(b_ERO.shape[2], -1)
        elif hasattr(module, "lora_A") and adapter in module.lora_A:
            for side in ("lora_A", "lora_B"):
                tensors[f"{name}.{side}.weight"] = whole_tensor(getattr(module, side)[adapter].weight)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def whole_tensor(weight: Tensor) -> Tensor:
    """Free of autograd, and put together where FSDP shards it, by all processes."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def load_adapter(
    model: PreTrainedModel, folder: Path, *, trainable: bool = False, dropout: float | None = None
) -> PeftModel:
    """Wrap `model` with an adapter from disk, ours or stock PEFT's; what `save_adapter` writes of it has the same
    configuration.

    Raises:
        OssiaError: damaged files, an adapter that is more than LoRA (see `ossia.adapters.fields`), or one of another
            base (shapes named).
    """
    return load_adapters(model, {"default": folder}, trainable=trainable, dropout=dropout)


def load_adapters(
    model: PreTrainedModel, folders: dict[str, Path], *, trainable: bool = False, dropout: float | None = None
) -> PeftModel:
    """Wrap `model` with several adapters, of which the first is active; see `load_adapter`.

    Args:
        model: from `load_model`.
        folders: by PEFT's name of each adapter, which may have no dot.
        trainable: whether they are to be trained on.
        dropout: share of their inputs zeroed then; default: each one's own.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[f"{name}.weight"] = module.out_features, module.in_features
        elif isinstance(module, Experts):
            shapes |= {f"{name}.{each}": (module.num_experts, *module.sizes[each]) for each in PROJECTIONS}
    found = {name: AdapterDeltas(folder) for name, folder in folders.items()}
    for deltas in found.values():
        deltas.check(shapes, "this model")
    wrapped: Any = model
    for name, deltas in found.items():
        settings, modules = deltas.settings, {key.rpartition(".")[0] for key in deltas.places}
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout if dropout is None else dropout,
            use_rslora=settings.use_rslora,
            rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern,
            task_type="CAUSAL_LM",
            inference_mode=not trainable,
        )
        wrapped = inject(wrapped, config, sorted(modules), settings.values, name)
        for key, module in wrapped.get_base_model().named_modules():
            if isinstance(module, ExpertsLora) and name in module.r:
                for each in PROJECTIONS:
                    if f"{key}.{each}" not in deltas.places:
                        module.leave_out(name, each)
        load_adapter_tensors(wrapped, folders[name], name)
    return wrapped.train(trainable)


def load_adapter_tensors(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Fill the adapters of `model` from disk; OssiaError names what is missing, extra or misshapen."""
    tensors = read_weights(folder)
    wanted = adapter_tensors(model, adapter)
    if set(tensors) != set(wanted):
        names = sorted(set(tensors) ^ set(wanted))
        odd = counted(len(names), "tensor")
        raise OssiaError(f"{folder}: this adapter does not fit the model; {odd} in only one, first {names[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise OssiaError(
                f"{folder}: adapter of another base model; {name} is {tuple(tensor.shape)}, "
                f"this model needs {tuple(wanted[name].shape)}"
            )
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, ExpertsLora) and adapter in module.r:
                for projection, prefix in _held(name, module, adapter):
                    a_EIR = getattr(module, f"lora_A_{projection}")[adapter]
                    b_ERO = getattr(module, f"lora_B_{projection}")[adapter]
                    count, _, rank = a_EIR.shape
                    a_EIR.copy_(tensors[f"{prefix}.lora_A.weight"].view(count, rank, -1).transpose(1, 2))
                    b_ERO.copy_(tensors[f"{prefix}.lora_B.weight"].view(-1, rank, count).permute(2, 1, 0))
            elif hasattr(module, "lora_A") and adapter in module.lora_A:
                for side in ("lora_A", "lora_B"):
                    getattr(module, side)[adapter].weight.copy_(tensors[f"{name}.{side}.weight"])


def _held(name: str, module: ExpertsLora, adapter: str) -> list[tuple[Projection, str]]:
    """Projections that an adapter is on, and what their tensors' names begin with."""
    held = [each for each in PROJECTIONS if adapter in getattr(module, f"lora_A_{each}")]
    return [(each, f"{name}{_NEST[each] if len(held) > 1 else ''}") for each in held]


def _config_on_disk(model: PeftModel, base_model: str | None, adapter: str) -> dict[str, Any]:
    config: Any = model.peft_config[adapter]
    values = {**model.ossia_written[adapter], "inference_mode": True, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    # PEFT refuses dropout beside target_parameters; it plays no part once training is over.
    values["lora_dropout"] = 0.0 if values.get("target_parameters") else config.lora_dropout
    if base_model is not None:
        values["base_model_name_or_path"] = base_model
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
