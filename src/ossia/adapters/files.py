"""Adapter folders, looked at without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ossia.adapters.fields import check_fields, shown
from ossia.errors import OssiaError, UsageError
from ossia.model.folder import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraSettings:
    """Settings of `adapter_config.json`, with PEFT's meanings.

    `target_modules`: endings of linear layers' names or an expression; `target_parameters`: endings of the names of
    experts' projections; `values`: the whole file.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | str
    exclude_modules: list[str] | str
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    target_parameters: list[str]
    values: dict[str, Any]

    @property
    def is_plain(self) -> bool:
        """Whether `target_modules` alone, as names and endings, tell which linear layers are adapted."""
        everywhere = self.layers_to_transform in (None, [])
        return isinstance(self.target_modules, list) and everywhere and not self.exclude_modules

    def rank_of(self, name: str) -> int:
        """Rank of a module or of a projection of experts."""
        return by_pattern(self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        """Factor of its product B A."""
        rank, alpha = self.rank_of(name), by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def by_pattern(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    """The value of the first pattern that a name ends in, as PEFT's `rank_pattern` and `alpha_pattern` are meant."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def read_settings(folder: Path) -> LoraSettings:
    """Read an adapter's configuration; OssiaError names the field that is damaged, or that is more than LoRA."""
    file = folder / CONFIG
    values = read_json(file)
    check_fields(values, file)

    def read(key: str, fits: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        value = values.get(key, default)
        if value is None and default is not None:
            value = default
        if not fits(value):
            raise OssiaError(f"{file}: {key} is {shown(value)}, not {wanted}")
        return value

    names, pattern = "a list of names", "names with a number above 0 each"
    found = LoraSettings(
        rank=read("r", _is_rank, "a whole number above 0"),
        alpha=float(read("lora_alpha", _is_positive, "a number above 0")),
        dropout=read("lora_dropout", _is_share, "a number from 0 to 1", 0.0),
        use_rslora=read("use_rslora", lambda value: isinstance(value, bool), "true or false", False),
        rank_pattern=read("rank_pattern", lambda value: _is_pattern(value, _is_rank), pattern, {}),
        alpha_pattern=read("alpha_pattern", lambda value: _is_pattern(value, _is_positive), pattern, {}),
        target_modules=read("target_modules", _is_names_or_expression, f"{names} or an expression", []),
        exclude_modules=read("exclude_modules", _is_names_or_expression, f"{names} or an expression", []),
        layers_to_transform=read("layers_to_transform", _is_layers, "a layer's number or a list of them"),
        layers_pattern=read("layers_pattern", _is_names_or_expression, f"a name or {names}", []) or None,
        target_parameters=read("target_parameters", _is_names, names, []),
        values=values,
    )
    if not found.target_modules and not found.target_parameters:
        raise OssiaError(f"{file}: neither target_modules nor target_parameters name anything")
    return found


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_share(value: Any) -> bool:
    return value == 0 or (_is_positive(value) and value <= 1)


def _is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(fits(each) and _is_expression(key) for key, each in value.items())


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_names_or_expression(value: Any) -> bool:
    return _is_expression(value) if isinstance(value, str) else _is_names(value)


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int for number in numbers)


def check_adapter(name: str) -> Path:
    """The absolute folder of an adapter that is plain LoRA.

    Raises:
        UsageError: no adapter's folder.
        OssiaError: see `read_settings`.
    """
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        near = sorted(path.name for path in folder.parent.glob("checkpoint-*")) if folder.parent.is_dir() else []
        hint = f" (there: {', '.join(near)})" if near else ""
        raise UsageError(f"--adapters {name}: no such folder{hint}")
    if not (folder / CONFIG).is_file():
        near = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        kind = "checkpoints" if all(each.startswith("checkpoint-") for each in near) else "adapters"
        hint = f"; its {kind} are {', '.join(near)}" if near else ""
        raise UsageError(f"--adapters {name}: no {CONFIG} in this folder, so it is not an adapter{hint}")
    read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        hint = (
            f"; {PICKLE} is a pickle, which can run any code and is not read: load it with PEFT and save it again"
            if (folder / PICKLE).is_file()
            else ", so it is not an adapter"
        )
        raise UsageError(f"--adapters {name}: no {WEIGHTS} in this folder{hint}")
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors, on the CPU; OssiaError where the file is damaged or holds NaN or infinity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise OssiaError(f"{folder / WEIGHTS}: damaged or cut short ({error})") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise OssiaError(
                f"{folder / WEIGHTS}: {name} holds NaN or infinity; take a checkpoint from before training diverged"
            )
    return tensors


def base_model_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    values = read_json(adapter / CONFIG)
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not name:
        raise UsageError(f"{adapter / CONFIG} names no base model; give --model DIR")
    if revision not in (None, "", "main") and not Path(name).is_dir():
        raise UsageError(
            f"{adapter / CONFIG} names revision {revision} of {name}; download that and give it with --model DIR"
        )
    return str(name)
