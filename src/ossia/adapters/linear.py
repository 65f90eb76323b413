"""PEFT's LoRA layer for linear weights, with the adapter fused into the product where that computes the same."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora import Linear
from torch import Tensor, nn

from ossia.kernels.lora_linear import Layer, lora_linears
from ossia.model.experts import fuses


class LinearLora(Linear):
    """As PEFT's, on disk and in use; one plain adapter without dropout on a GPU takes the fused path."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        layer = None if args or kwargs else self.fusable(x)
        return super().forward(x, *args, **kwargs) if layer is None else lora_linears(x, [layer])[0]

    def fusable(self, x: Tensor) -> Layer | None:
        """What the fused product of x takes; None where PEFT's way is the only one."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not fuses(x) or len(active) != 1 or self.disable_adapters or self.merged:
            return None
        name = active[0]
        drops = self.training and getattr(self.lora_dropout[name], "p", 0) > 0
        a, b = (cast(nn.Linear, side[name]) for side in (self.lora_A, self.lora_B))
        if drops or name in self.lora_variant or b.bias is not None:
            return None
        base = cast(nn.Linear, self.get_base_layer())
        return Layer(base.weight, base.bias, a.weight, b.weight, self.scaling[name])
