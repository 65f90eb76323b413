"""Which modules an adapter reaches: from `--target_modules` and `--target_experts` to names, or an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ossia.errors import UsageError, nearest
from ossia.model.folder import read_json, weight_files
from ossia.model.names import PROJECTIONS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Targets:
    """`linear`: names of linear layers, as PEFT's `target_modules`; `layers`: layers whose experts are adapted."""

    linear: list[str]
    layers: list[int]
    all_layers: bool = False

    @property
    def parameters(self) -> list[str]:
        """PEFT's `target_parameters` for the experts."""
        if self.all_layers:
            return [f"mlp.experts.{name}" for name in PROJECTIONS]
        return [f"layers.{layer}.mlp.experts.{name}" for layer in self.layers for name in PROJECTIONS]

    @property
    def modules(self) -> list[str]:
        """Expert modules, in the form PEFT matches names with."""
        return ["mlp.experts"] if self.all_layers else [f"layers.{layer}.mlp.experts" for layer in self.layers]


def find_targets(model: nn.Module, target_modules: list[str], target_experts: str = "auto") -> Targets:
    """Resolve flags against a model.

    Args:
        model: the model without adapters.
        target_modules: `all-linear` (every linear layer but the head), `none`, or endings of names.
        target_experts: `auto` (all where the model has gpt-oss experts), `all`, `none`, or layers: `7,15,23`.

    Raises:
        UsageError: a target that matches nothing, with near misses.
    """
    from torch import nn

    from ossia.model.experts import Experts

    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    experts = {_layer(name): name for name, module in model.named_modules() if isinstance(module, Experts)}
    layers = _expert_layers(sorted(experts), target_experts)
    targets = Targets(_linear_targets(linear, target_modules), layers, bool(layers) and len(layers) == len(experts))
    _refuse_nothing(targets.linear, targets.layers)
    return targets


def check_targets(folder: Path, target_modules: list[str], target_experts: str = "auto") -> tuple[list[str], list[int]]:
    """What `find_targets` would refuse, as far as the names of a model folder's tensors tell. Loads nothing.

    Returns:
        Names of the linear layers that are adapted, and the layers whose experts are.
    """
    tensors = [name.removesuffix(".weight") for name in weight_files(folder) if name.endswith(".weight")]
    names = [name for name in tensors if "norm" not in name and "embed" not in name and "router" not in name]
    return match_targets(names, read_json(folder / "config.json"), target_modules, target_experts)


def linear_layers(config: dict[str, Any]) -> list[str]:
    """Names of gpt-oss's linear layers that adapters may be on, from its config.json."""
    return [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(config["num_hidden_layers"]) for name in "qkvo"
    ]


def match_targets(
    names: list[str], config: dict[str, Any], target_modules: list[str], target_experts: str = "auto"
) -> tuple[list[str], list[int]]:
    """`check_targets` for a model whose linear layers have these names."""
    layers = range(config["num_hidden_layers"]) if config.get("model_type") == "gpt_oss" else ()
    endings = _linear_targets(names, target_modules) if names else []
    linear = [name for name in names if any(name == end or name.endswith(f".{end}") for end in endings)]
    adapted = _expert_layers(list(layers), target_experts)
    if names:
        _refuse_nothing(linear, adapted)
    return linear, adapted


def _refuse_nothing(linear: list[str], layers: list[int]) -> None:
    if not linear and not layers:
        raise UsageError("nothing to train: --target_modules and --target_experts are both none")


def _linear_targets(names: Iterable[str], wanted: list[str]) -> list[str]:
    endings = sorted({name.rpartition(".")[2] for name in names})
    if wanted == ["none"]:
        return []
    if wanted == ["all-linear"]:
        return endings
    for word in wanted:
        if not any(name == word or name.endswith(f".{word}") for name in names):
            raise UsageError(
                f"--target_modules {word}: no linear layer of this model ends so{nearest(word, endings)} "
                f"(linear layers: {', '.join(endings)}; experts are chosen with --target_experts)"
            )
    return list(wanted)


def _expert_layers(layers: list[int], wanted: str) -> list[int]:
    if wanted == "none" or (wanted == "auto" and not layers):
        return []
    if not layers:
        raise UsageError(f"--target_experts {wanted}: this model has no gpt-oss experts; use --target_experts none")
    if wanted in ("auto", "all"):
        return layers
    chosen = sorted({int(part) for part in wanted.split(",")})
    unknown = [layer for layer in chosen if layer not in layers]
    if unknown:
        raise UsageError(
            f"--target_experts {wanted}: no layer {unknown[0]}; this model's layers are {layers[0]} to {layers[-1]}"
        )
    return chosen


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])
