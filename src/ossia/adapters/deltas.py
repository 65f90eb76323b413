"""What an adapter on disk (PEFT's layout) adds to each tensor of its base; read tensor by tensor, when asked for.

R rank, E experts, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ossia.adapters.files import WEIGHTS, read_settings
from ossia.errors import OssiaError
from ossia.kernels.mxfp4 import BLOCK
from ossia.model.names import PROJECTIONS
from ossia.model.stream import Stored, read_header, read_rows


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


class AdapterDeltas:
    """The changes of an adapter by base tensor. Making it reads the configuration and the header of the weights.

    Raises:
        OssiaError: damaged files, or an adapter that is more than LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = read_settings(folder)
        self.rank, self.scaling = settings.rank, settings.scaling
        self.stored = read_header(folder / WEIGHTS)
        self.left = set(self.stored)
        targeted = {name.rpartition(".")[2] for name in settings.target_parameters}
        # PEFT nests the second projection around the first; one targeted alone is not nested.
        self.nested = targeted.issuperset(PROJECTIONS)
        self.alone = None if self.nested else next(iter(targeted), None)

    def linear(self, name: str, shape: tuple[int, ...]) -> Delta | None:
        """The change of a linear layer's weight `name` [O, I], if there is one; OssiaError where it does not fit."""
        return self._delta(f"base_model.model.{name.removesuffix('.weight')}", name, shape)

    def experts(self, name: str, shape: tuple[int, ...]) -> Delta | None:
        """The change of an expert projection `name` [E, I, O], if there is one; OssiaError where it does not fit."""
        module, _, projection = name.rpartition(".")
        if not self.nested and projection != self.alone:
            return None
        inner = ".base_layer" if self.nested and projection == "gate_up_proj" else ""
        return self._delta(f"base_model.model.{module}{inner}", name, shape)

    def _delta(self, prefix: str, name: str, shape: tuple[int, ...]) -> Delta | None:
        keys = [f"{prefix}.lora_{side}.weight" for side in "AB"]
        found = [key for key in keys if key in self.stored]
        if not found:
            return None
        if len(found) < len(keys):
            raise OssiaError(f"{self.folder / WEIGHTS}: {found[0]} is alone, without its other half; copy it again")
        a, b = (self.stored[key] for key in keys)
        if len(shape) == 3:
            experts, inputs, outputs = shape
            wanted = (experts * self.rank, inputs), (outputs, self.rank * experts)
        else:
            experts, wanted = 0, ((self.rank, shape[-1]), (shape[0], self.rank))
        if (a.shape, b.shape) != wanted:
            raise OssiaError(
                f"{self.folder}: adapter of another base model; {name} is {list(shape)} in the base, so its lora_A and "
                f"lora_B would be {_both(wanted)}, not {_both((a.shape, b.shape))}; give --model with its own base"
            )
        self.left.difference_update(keys)
        return Delta(a, b, self.scaling, experts)

    def check_all_used(self, base: Path) -> None:
        """OssiaError naming a tensor of the adapter that belongs to none of the base's."""
        if self.left:
            raise OssiaError(
                f"{self.folder}: adapter of another base model; {len(self.left)} of its tensors have no weight in "
                f"{base}, first {min(self.left)}; give --model with its own base"
            )


def expert_shape(dense: Stored | None, scales: Stored | None) -> tuple[int, ...]:
    """[E, I, O] of an expert projection, stored whole or as MXFP4 with these scales."""
    if dense is not None:
        return dense.shape
    assert scales is not None
    experts, outputs, groups = scales.shape
    return experts, groups * BLOCK, outputs


def _both(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)
