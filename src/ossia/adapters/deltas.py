"""What an adapter on disk (PEFT's layout) adds to each tensor of its base; read tensor by tensor, when asked for.

R rank, E experts, O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from ossia.adapters.fields import FIELDS, MERGE
from ossia.adapters.files import CONFIG, WEIGHTS, LoraSettings, read_settings
from ossia.errors import OssiaError
from ossia.kernels.mxfp4 import BLOCK
from ossia.model.names import PROJECTIONS
from ossia.model.stream import Stored, read_header, read_rows

_KEY = re.compile(r"base_model\.model\.(?P<place>(?P<module>.+?)(\.base_layer)?)\.lora_[AB]\.weight")
_OUTER = ("lm_head", "embed_tokens")
_FOREIGN = (
    (r"embed_tokens|lora_embedding", "a change of the embeddings, which is not computed here"),
    ("lm_head", "a change of the head, which is not computed here"),
    ("lora_magnitude_vector", FIELDS["use_dora"].says),
    (r"lora_B\.bias", FIELDS["lora_bias"].says),
    (r"bias$", FIELDS["bias"].says),
    ("modules_to_save", FIELDS["modules_to_save"].says),
    ("", "which is no factor of LoRA"),
)
"""Reasons to refuse tensors that are no factors of LoRA, by a pattern of their names; the first match counts."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Factors:
    """A change as a product: `left` [O, R] and `right` [R, I] of a linear layer, [E, I, R] and [E, R, O] of experts."""

    left: Tensor
    right: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """The change of the base tensor's rows (of its experts, where it has these), float32."""
        right = self.right if self.right.ndim == 2 else self.right[first:last]
        return self.left[first:last] @ right


@dataclass(frozen=True)
class Delta:
    """The change of one base tensor, still on disk."""

    lora_a: Stored
    lora_b: Stored
    scaling: float
    experts: int = 0

    def read(self, device: torch.device) -> Factors:
        """Both factors in float32, the scaling in the left one."""
        a, b = (read_rows(side, 0, side.shape[0]).to(device).float() for side in (self.lora_a, self.lora_b))
        if not self.experts:
            return Factors(b * self.scaling, a)
        a_EIR = a.view(self.experts, -1, a.shape[1]).transpose(1, 2)
        b_ERO = b.view(b.shape[0], -1, self.experts).permute(2, 1, 0)
        return Factors(a_EIR * self.scaling, b_ERO)


class Place(NamedTuple):
    """Names in the file of an adapter's tensors for one weight of the base; `on_experts`: of experts."""

    lora_a: str
    lora_b: str
    rank: int
    scaling: float
    on_experts: bool


class AdapterDeltas:
    """The changes of an adapter by base tensor: `places` have `model.layers.0.self_attn.q_proj.weight` and
    `model.layers.0.mlp.experts.down_proj`. Making it reads the configuration and the header of the weights.

    Raises:
        OssiaError: damaged files, an adapter that is more than LoRA, or tensors that its configuration does not target.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_settings(folder)
        for end in self.settings.target_parameters:
            if end.rpartition(".")[2] not in PROJECTIONS:
                raise OssiaError(
                    f"{folder / CONFIG}: target_parameters has {end}, which is no projection of experts; {MERGE}"
                )
        self.stored = read_header(folder / WEIGHTS)
        self._peft = _matcher(self.settings, folder)
        self.places = dict(self._places())
        if not self.places:
            raise OssiaError(f"{folder / WEIGHTS}: no tensors in it; copy the file again")
        for name, place in self.places.items():
            if not self.targets(name):
                raise OssiaError(
                    f"{folder / WEIGHTS}: has {place.lora_a}, which {CONFIG} does not target, so PEFT would leave it "
                    "out; copy both files again, from one save"
                )

    def _places(self) -> Iterator[tuple[str, Place]]:
        sides: dict[str, set[str]] = {}
        for key, stored in self.stored.items():
            if not (found := _KEY.fullmatch(key)) or found["module"].rpartition(".")[2] in _OUTER:
                why = next(why for pattern, why in _FOREIGN if re.search(pattern, key))
                raise OssiaError(f"{self.folder / WEIGHTS}: has {key}, {why}; {MERGE}")
            if stored.dtype not in _DTYPES or len(stored.shape) != 2:
                raise OssiaError(
                    f"{self.folder / WEIGHTS}: {key} is {_name(stored.dtype)} {list(stored.shape)}, not a matrix "
                    "of floating-point numbers; save the adapter again"
                )
            sides.setdefault(found["place"], set()).add(key)
        for place, keys in sides.items():
            if len(keys) == 1:
                raise OssiaError(
                    f"{self.folder / WEIGHTS}: {min(keys)} is alone, without its other half; copy it again"
                )
            module = place.removesuffix(".base_layer")
            on_experts = module.rpartition(".")[2] == "experts"
            projections = [name for name in PROJECTIONS if on_experts and self.targets(f"{module}.{name}")]
            nests = len(projections) > 1
            if place != module and not nests:
                raise OssiaError(
                    f"{self.folder / WEIGHTS}: has {min(keys)}, but {CONFIG} does not target both projections of "
                    f"{module} in target_parameters; copy both files again, from one save"
                )
            # PEFT nests the second projection around the first; one targeted alone is not nested.
            name = f"{module}.{projections[-1 if place == module else 0]}" if projections else f"{module}.weight"
            of = name if projections else module
            a, b = sorted(keys)
            yield name, Place(a, b, self.settings.rank_of(of), self.settings.scaling_of(of), bool(projections))

    def targets(self, name: str) -> bool:
        """Whether the configuration means a base tensor, as PEFT understands it."""
        if not name.endswith(".weight"):
            return any(name == end or name.endswith(f".{end}") for end in self.settings.target_parameters)
        module = name.removesuffix(".weight")
        if self.settings.target_modules == "all-linear":
            return not any(word in module for word in ("embed", "norm", "router", "lm_head"))
        return bool(check_target_module_exists(self._peft, module))

    def delta(self, name: str, shape: tuple[int, ...]) -> Delta | None:
        """The change of a base tensor, if there is one: of a linear layer's weight [O, I], or of a projection of
        experts [E, I, O]. OssiaError where it does not fit."""
        place = self.places.get(name)
        if place is None:
            return None
        a, b = self.stored[place.lora_a], self.stored[place.lora_b]
        experts, wanted = 0, ((place.rank, shape[-1]), (shape[0], place.rank))
        if place.on_experts:
            experts, inputs, outputs = shape
            wanted = (experts * place.rank, inputs), (outputs, place.rank * experts)
        if (a.shape, b.shape) != wanted:
            raise OssiaError(
                f"{self.folder}: adapter of another base model; {name} is {list(shape)} in the base, so its lora_A and "
                f"lora_B would be {_both(wanted)}, not {_both((a.shape, b.shape))}; give --model with its own base"
            )
        return Delta(a, b, place.scaling, experts)

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: str) -> None:
        """Hold the adapter against a base.

        Args:
            shapes: of the base's tensors by name: of linear layers [O, I], of projections of experts [E, I, O].
            base: named in errors.

        Raises:
            OssiaError: other shapes, tensors that the base has no weight for, or targets without tensors.
        """
        for name, shape in shapes.items():
            if self.delta(name, shape) is None and self.targets(name):
                raise self.lacks(name)
        if left := self.places.keys() - shapes.keys():
            raise OssiaError(
                f"{self.folder}: adapter of another base model; {len(left)} of the weights it changes are not in "
                f"{base}, first {min(left)}; give --model with its own base"
            )

    def lacks(self, name: str) -> OssiaError:
        """The error that a targeted base tensor has no tensors in the file."""
        return OssiaError(
            f"{self.folder / WEIGHTS}: no tensors for {name}, which {CONFIG} targets; copy both files again, from one "
            "save"
        )


def linear_targets(deltas: AdapterDeltas) -> list[str]:
    """Endings of the names of the linear layers that an adapter is on, or whole names where it takes these."""
    settings = deltas.settings
    if settings.is_plain:
        return list(settings.target_modules)
    return sorted(name.removesuffix(".weight") for name, place in deltas.places.items() if not place.on_experts)


def expert_shape(dense: Stored | None, scales: Stored | None) -> tuple[int, ...]:
    """[E, I, O] of an expert projection, stored whole or as MXFP4 with these scales."""
    if dense is not None:
        return dense.shape
    assert scales is not None
    experts, outputs, groups = scales.shape
    return experts, groups * BLOCK, outputs


def _both(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)


def _matcher(settings: LoraSettings, folder: Path) -> LoraConfig:
    """The targets as PEFT matches names with them."""
    try:
        return LoraConfig(
            target_modules=settings.target_modules,
            exclude_modules=settings.exclude_modules or None,
            layers_to_transform=settings.layers_to_transform,
            layers_pattern=settings.layers_pattern,
        )
    except (TypeError, ValueError) as error:
        raise OssiaError(f"{folder / CONFIG}: not a configuration that PEFT takes ({error})") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
