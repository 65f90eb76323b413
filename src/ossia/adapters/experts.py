"""LoRA on all experts of a layer at once, as a PEFT module: `y += scaling * (x A_e) B_e` for each row's expert e.

Full-size deltas are never built. E experts, r rank, S rows sorted by expert.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ossia.adapters.files import by_pattern
from ossia.kernels.expert_mlp import Adapter
from ossia.kernels.grouped_linear import grouped_linear
from ossia.model.experts import Experts, fuses
from ossia.model.names import PROJECTIONS, Projection


class ExpertsLora(nn.Module, LoraLayer):
    """Adapters of a layer's experts.

    `lora_A_<projection>[adapter]` is [E, in, r] and `lora_B_<projection>[adapter]` [E, r, out], float32, with the rank
    and the scale that PEFT's patterns give that projection. The layout on disk is PEFT's (see `ossia.adapters.io`).
    """

    adapter_layer_names = tuple(f"lora_{side}_{name}" for name in PROJECTIONS for side in "AB")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(self, base_layer: Experts, adapter_name: str, config: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self._scales: dict[tuple[str, str], float] = {}
        self.update_layer(adapter_name, config.r, config.lora_alpha, config, target_name=kwargs.get("target_name", ""))

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter: A uniform as `nn.Linear` starts, B zero.

        Args:
            adapter_name: PEFT's name of it.
            r, lora_alpha: where no pattern says otherwise.
            config: the adapter's `LoraConfig`.
            kwargs: `target_name`, the name of this module.
        """
        base = cast(Experts, self.get_base_layer())
        self.r[adapter_name] = config.r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = _scaling(config.lora_alpha, config.r, config)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        device = base.get_parameter("gate_up_proj_bias").device
        for name in PROJECTIONS:
            inputs, outputs = base.sizes[name]
            key = f"{kwargs.get('target_name', '')}.{name}"
            r = by_pattern(config.rank_pattern, key, config.r)
            self._scales[adapter_name, name] = _scaling(
                by_pattern(config.alpha_pattern, key, config.lora_alpha), r, config
            )
            a_EIR = torch.empty(base.num_experts, inputs, r, device=device)
            nn.init.uniform_(a_EIR, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
            getattr(self, f"lora_A_{name}")[adapter_name] = nn.Parameter(a_EIR)
            getattr(self, f"lora_B_{name}")[adapter_name] = nn.Parameter(
                torch.zeros(base.num_experts, r, outputs, device=device)
            )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def leave_out(self, adapter: str, projection: Projection) -> None:
        """Take an adapter from one of the projections."""
        for side in "AB":
            del getattr(self, f"lora_{side}_{projection}")[adapter]

    def pair(self, adapter: str) -> tuple[Adapter, Adapter, float]:
        """An adapter of both projections with one rank and one scale, as the fused path takes it: a smaller rank, and a
        projection without adapter, are filled up with zeros; another scale goes into B."""
        held = [name for name in PROJECTIONS if adapter in getattr(self, f"lora_A_{name}")]
        like, scale = getattr(self, f"lora_A_{held[0]}")[adapter], self._scales[adapter, held[0]]
        rank = max(getattr(self, f"lora_A_{name}")[adapter].shape[2] for name in held)
        sides = []
        for name in PROJECTIONS:
            if name not in held:
                inputs, outputs = cast(Experts, self.get_base_layer()).sizes[name]
                shapes = (len(like), inputs, rank), (len(like), rank, outputs)
                sides.append(Adapter(*(like.new_zeros(shape) for shape in shapes)))
                continue
            a_EIr, b_ErO = (getattr(self, f"lora_{side}_{name}")[adapter] for side in "AB")
            if more := rank - a_EIr.shape[2]:
                a_EIr, b_ErO = F.pad(a_EIr, (0, more)), F.pad(b_ErO, (0, 0, 0, more))
            if (own := self._scales[adapter, name]) != scale:
                b_ErO = b_ErO * (own / scale)
            sides.append(Adapter(a_EIr, b_ErO))
        return sides[0], sides[1], scale

    def forward(
        self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, residual_TH: Tensor | None = None
    ) -> Tensor:
        """As `Experts.forward`, with the active adapters."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.r]
        if not active:
            return self.base_layer(hidden_TH, index_TK, weight_TK, residual_TH)
        if fuses(hidden_TH) and len(active) == 1 and not self._drops(active[0]):
            *pair, scale = self.pair(active[0])
            return self.base_layer(hidden_TH, index_TK, weight_TK, residual_TH, adapters=tuple(pair), scale=scale)
        return self.base_layer(hidden_TH, index_TK, weight_TK, residual_TH, self._delta)

    def _drops(self, adapter: str) -> bool:
        return self.training and cast(nn.Dropout, self.lora_dropout[adapter]).p > 0

    def _delta(self, projection: Projection, rows: Tensor, offsets_E: Tensor) -> Tensor:
        total: Tensor | None = None
        for adapter in self.active_adapters:
            if adapter not in getattr(self, f"lora_A_{projection}"):
                continue
            a_EIR = getattr(self, f"lora_A_{projection}")[adapter].to(rows.dtype)
            b_ERO = getattr(self, f"lora_B_{projection}")[adapter].to(rows.dtype)
            if rows.is_cuda and a_EIR.shape[-1] % 8:
                # torch's grouped_mm wants rows of 16 bytes.
                pad = -a_EIR.shape[-1] % 8
                a_EIR, b_ERO = F.pad(a_EIR, (0, pad)), F.pad(b_ERO, (0, 0, 0, pad))
            inner = grouped_linear(self.lora_dropout[adapter](rows), a_EIR, offsets_E)
            part = grouped_linear(inner * self._scales[adapter, projection], b_ERO, offsets_E)
            total = part if total is None else total + part
        return torch.zeros((), device=rows.device, dtype=rows.dtype) if total is None else total

    def get_delta(self, projection: Projection, adapter: str) -> Tensor:
        """The change of a projection's weight, float32 [E, in, out]."""
        a_EIR = getattr(self, f"lora_A_{projection}")[adapter].float()
        b_ERO = getattr(self, f"lora_B_{projection}")[adapter].float()
        return torch.bmm(a_EIR, b_ERO) * self._scales[adapter, projection]


def _scaling(alpha: float, rank: int, config: Any) -> float:
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
