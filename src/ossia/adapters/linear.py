"""PEFT's LoRA layer for linear weights, with the adapter fused into the product where that computes the same."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora import Linear
from torch import Tensor, nn

from ossia.kernels.lora_linear import lora_linear
from ossia.model.experts import fuses


class LinearLora(Linear):
    """As PEFT's, on disk and in use; one plain adapter without dropout on a GPU takes the fused path."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = fuses(x) and len(active) == 1 and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or not self._is_plain(active[0]):
            return super().forward(x, *args, **kwargs)
        name = active[0]
        base, a, b = cast(nn.Linear, self.get_base_layer()), self._weight("A", name), self._weight("B", name)
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])

    def _weight(self, side: str, adapter: str) -> Tensor:
        return getattr(self, f"lora_{side}")[adapter].weight

    def _is_plain(self, adapter: str) -> bool:
        drops = self.training and getattr(self.lora_dropout[adapter], "p", 0) > 0
        return not drops and adapter not in self.lora_variant and self.lora_B[adapter].bias is None
