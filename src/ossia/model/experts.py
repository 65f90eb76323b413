"""gpt-oss's experts with their weights left in MXFP4, or in floating point where the checkpoint has them so.

T tokens, K experts per token, S = T·K rows sorted by expert, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ossia.kernels.grouped_linear import grouped_linear, grouped_linear_mxfp4
from ossia.kernels.mxfp4 import dequantize
from ossia.model.names import Projection

Delta = Callable[[Projection, Tensor, Tensor], Tensor]
"""`(projection, rows, offsets) -> rows` to add to a projection's output."""


class Experts(nn.Module):
    """Frozen experts of one layer, with the names that gpt-oss checkpoints use.

    MXFP4: buffers `<projection>_blocks` uint8 [E, out, in/32, 16] and `<projection>_scales` uint8 [E, out, in/32].
    Floating point: parameter `<projection>` [E, in, out], as transformers holds it. Biases
    `<projection>_bias` [E, out]. gate and up alternate in `gate_up_proj`'s outputs (even: gate, odd: up).
    """

    def __init__(self, config, quantized: bool) -> None:
        super().__init__()
        self.num_experts: int = config.num_local_experts
        self.alpha: float = getattr(config, "swiglu_alpha", 1.702)
        self.limit: float = getattr(config, "swiglu_limit", 7.0)
        self.quantized = quantized
        sizes = {
            "gate_up_proj": (config.hidden_size, 2 * config.intermediate_size),
            "down_proj": (config.intermediate_size, config.hidden_size),
        }
        self.sizes: dict[str, tuple[int, int]] = sizes
        for name, (inputs, outputs) in sizes.items():
            self.register_parameter(
                f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, outputs), requires_grad=False)
            )
            if quantized:
                shape = (self.num_experts, outputs, inputs // 32)
                self.register_buffer(f"{name}_blocks", torch.empty(*shape, 16, dtype=torch.uint8))
                self.register_buffer(f"{name}_scales", torch.empty(shape, dtype=torch.uint8))
            else:
                weight = nn.Parameter(torch.empty(self.num_experts, inputs, outputs), requires_grad=False)
                self.register_parameter(name, weight)

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, delta: Delta | None = None) -> Tensor:
        """Sum of each token's experts, weighted: [T, H] in hidden's dtype.

        Args:
            hidden_TH: tokens.
            index_TK: int64 experts of each token.
            weight_TK: their weights.
            delta: what an adapter adds to each projection.
        """
        expert_S, order_S = index_TK.flatten().sort(stable=True)
        # histc, unlike bincount, does not make the host wait for the GPU; on a CPU it takes floats only.
        counted = expert_S.int() if expert_S.is_cuda else expert_S.float()
        offsets_E = counted.histc(self.num_experts, 0, self.num_experts - 1).cumsum(0).to(torch.int32)
        rows_SH = hidden_TH[order_S // index_TK.shape[1]]
        gated_SI = self._gate(self._project("gate_up_proj", rows_SH, expert_S, offsets_E, delta))
        out_SH = self._project("down_proj", gated_SI, expert_S, offsets_E, delta)
        position_S = torch.empty_like(order_S)
        position_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        out_TKH = out_SH[position_S].view(*index_TK.shape, -1)
        return (out_TKH.float() * weight_TK[..., None].float()).sum(1).to(hidden_TH.dtype)

    def _project(
        self, name: Projection, rows: Tensor, expert_S: Tensor, offsets_E: Tensor, delta: Delta | None
    ) -> Tensor:
        if self.quantized:
            out = grouped_linear_mxfp4(
                rows, self.get_buffer(f"{name}_blocks"), self.get_buffer(f"{name}_scales"), offsets_E
            )
        else:
            out = grouped_linear(rows, self.get_parameter(name).to(rows.dtype), offsets_E)
        if delta is not None:
            out = out + delta(name, rows, offsets_E)
        return out + self.get_parameter(f"{name}_bias").to(out.dtype)[expert_S]

    def _gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., 0::2].float(), gate_up[..., 1::2].float()
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return ((up + 1) * gate * torch.sigmoid(self.alpha * gate)).to(gate_up.dtype)

    def dense(self, name: Projection, dtype: torch.dtype) -> Tensor:
        """A projection's weight in floating point, [E, in, out]."""
        if self.quantized:
            return dequantize(self.get_buffer(f"{name}_blocks"), self.get_buffer(f"{name}_scales"), dtype).transpose(
                1, 2
            )
        return self.get_parameter(name).to(dtype)
