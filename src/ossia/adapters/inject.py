"""Puts LoRA on a model and says what is trained."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ossia.adapters.experts import ExpertsLora
from ossia.adapters.linear import LinearLora
from ossia.adapters.targets import find_targets
from ossia.model.experts import Experts


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: list[str] | None = None,
    target_experts: str = "auto",
) -> PeftModel:
    """A PEFT model whose adapters, float32, are all that trains.

    Args:
        model: from `load_model`.
        rank: r of every adapter.
        alpha: adapters are scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`.
        dropout: share of adapter inputs zeroed while training.
        use_rslora: see `alpha`.
        target_modules: see `find_targets`; default `["all-linear"]`.
        target_experts: see `find_targets`.

    Raises:
        UsageError: a target that matches nothing.
    """
    targets = find_targets(model, target_modules or ["all-linear"], target_experts)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    written = {"target_modules": targets.linear, "target_parameters": targets.parameters or None}
    return inject(model, config, targets.linear + targets.modules, config.to_dict() | written)


def inject(
    model: PreTrainedModel | PeftModel,
    config: LoraConfig,
    modules: list[str],
    written: dict[str, Any],
    name: str = "default",
) -> PeftModel:
    """Put fresh adapters on `model`, wrapping it if it has none yet.

    Args:
        model: with or without adapters.
        config: rank, scale, dropout.
        modules: linear layers and modules of experts, as PEFT's `target_modules`.
        written: the `adapter_config.json` that `save_adapter` is to write for it.
        name: PEFT's name of the adapter.
    """
    config.target_modules = modules
    config._register_custom_module({Experts: ExpertsLora, nn.Linear: LinearLora})
    with warnings.catch_warnings():
        # PEFT reports modules it has no sizes for (ours), and a base folder that has moved.
        warnings.filterwarnings("ignore", "Unsupported layer type|The PEFT config's `base_model")
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=name)
    wrapped.ossia_written = {**getattr(wrapped, "ossia_written", {}), name: written}  # type: ignore[assignment]
    return wrapped


def coverage(model: PeftModel) -> list[tuple[str, int, int, int]]:
    """What is trained: (kind of module, modules, trained parameters, parameters of the base it adapts)."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module) or not hasattr(module, "lora_alpha"):
            continue
        kind = re.sub(r"^.*layers\.\d+\.", "", name)
        trained = sum(p.numel() for key, p in module.named_parameters() if "lora_" in key and p.requires_grad)
        row = rows[kind]
        row[0] += 1
        row[1] += trained
        row[2] += _base_size(base)
    return [(kind, *row) for kind, row in rows.items()]  # type: ignore[misc]


def _base_size(base: nn.Module) -> int:
    if isinstance(base, Experts):
        return base.num_experts * sum(inputs * outputs for inputs, outputs in base.sizes.values())
    return sum(p.numel() for p in base.parameters())


def coverage_lines(model: PeftModel, total: int) -> list[str]:
    """The table printed before training. `total`: parameters of the base model."""
    rows = coverage(model)
    trained = sum(row[2] for row in rows)
    width = max(len(row[0]) for row in rows)
    lines = [f"  {'trained':<{width}}  modules  LoRA parameters  of base parameters"]
    lines += [f"  {kind:<{width}}  {count:>7}  {lora:>15,}  {base:>18,}" for kind, count, lora, base in rows]
    reached = sum(row[3] for row in rows)
    lines.append(
        f"  {trained:,} parameters train, {trained / total:.2%} of the base's {total:,}; "
        f"adapters reach {reached / total:.1%} of it"
    )
    if not any(isinstance(module, ExpertsLora) for module in model.modules()) and any(
        isinstance(module, Experts) for module in model.modules()
    ):
        lines.append("  experts are not trained (--target_experts none)")
    return lines


def base_parameters(model: nn.Module) -> int:
    """Parameters of a model without adapters, MXFP4 weights counted one by one."""
    quantized = sum(
        _base_size(module) for module in model.modules() if isinstance(module, Experts) and module.quantized
    )
    return quantized + sum(p.numel() for p in model.parameters())
