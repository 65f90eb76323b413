"""gpt-oss's experts with their weights left in MXFP4, or in floating point where the checkpoint has them so.

T tokens, K experts per token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ossia.kernels import expert_mlp
from ossia.kernels.available import HAS_TRITON
from ossia.kernels.expert_mlp import Adapter, Frozen, Memory
from ossia.model.names import PROJECTIONS, Projection

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Where a configuration has none."""

Delta = Callable[[Projection, Tensor, Tensor], Tensor]
"""`(projection, rows, offsets) -> rows` to add to a projection's output."""


class Experts(nn.Module):
    """Frozen experts of one layer, with the names that gpt-oss checkpoints use.

    MXFP4: buffers `<projection>_blocks` uint8 [E, out, in/32, 16] and `<projection>_scales` uint8 [E, out, in/32],
    which may rest in pinned host memory. Floating point: parameter `<projection>` [E, in, out], as transformers holds
    it. Biases `<projection>_bias` [E, out]. gate and up alternate in `gate_up_proj`'s outputs (even: gate, odd: up).
    """

    memory: Memory | None = None
    """What the fused path holds between forward and backward; None: its defaults."""

    def __init__(self, config, quantized: bool) -> None:
        super().__init__()
        self.num_experts: int = config.num_local_experts
        self.alpha: float = getattr(config, "swiglu_alpha", SWIGLU_ALPHA)
        self.limit: float = getattr(config, "swiglu_limit", SWIGLU_LIMIT)
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
        self._wide: dict[str, Tensor] = {}

    def hold_expanded(self, tail: int) -> None:
        """Expand the weights for good, bfloat16, with room for an adapter of rank `tail`, in place of their blocks:
        spends memory on time."""
        for name in PROJECTIONS:
            frozen = self.frozen(name)
            empty_Er = frozen.bias_EO.new_zeros(self.num_experts, 1, tail)
            a_EIr = empty_Er.expand(-1, frozen.inputs, -1) if tail else None
            b_ErO = empty_Er.transpose(1, 2).expand(-1, -1, frozen.bias_EO.shape[1]) if tail else None
            self._wide[name] = frozen.expand(torch.bfloat16, a_EIr, b_ErO)
            for half in ("blocks", "scales") if self.quantized else ():
                del self._buffers[f"{name}_{half}"]

    def forward(
        self,
        hidden_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        residual_TH: Tensor | None = None,
        delta: Delta | None = None,
        adapters: tuple[Adapter, Adapter] | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Sum of each token's experts, weighted, and of `residual`: [T, H] in hidden's dtype.

        Args:
            hidden_TH: tokens.
            index_TK: int64 experts of each token.
            weight_TK: their weights, float32.
            residual_TH: what the sum is added to.
            delta: what adapters add to each projection, on the general path.
            adapters: one adapter of both projections, on the fused path, where `fuses` says so.
            scale: of `adapters`.
        """
        gate_up, down = self.frozen("gate_up_proj"), self.frozen("down_proj")
        common = (hidden_TH, index_TK, weight_TK, gate_up, down, self.alpha, self.limit)
        if delta is None and fuses(hidden_TH):
            from ossia.kernels.expert_mlp.fused import expert_mlp as fused

            first, second = adapters or (None, None)
            return fused(*common, first, second, scale, self.memory, residual_TH)
        deltas = [None if delta is None else functools.partial(delta, name) for name in PROJECTIONS]
        out_TH = expert_mlp.reference(*common, deltas[0], deltas[1])
        return out_TH if residual_TH is None else residual_TH + out_TH

    def frozen(self, name: Projection) -> Frozen:
        """A projection's weight as it is held."""
        bias_EO, (inputs, _) = self.get_parameter(f"{name}_bias"), self.sizes[name]
        if name in self._wide:
            return Frozen(bias_EO, inputs, wide=self._wide[name])
        if self.quantized:
            return Frozen(bias_EO, inputs, self.get_buffer(f"{name}_blocks"), self.get_buffer(f"{name}_scales"))
        return Frozen(bias_EO, inputs, dense_EIO=self.get_parameter(name))

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        """What rests in pinned memory stays there when the model moves."""
        with kept_on_host(self._buffers):
            return super()._apply(fn, recurse)


@contextlib.contextmanager
def kept_on_host(tensors: dict[str, Any]) -> Iterator[None]:
    """Inside, a module's tensors in pinned memory are out of reach of what moves it."""
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.is_pinned()}
    tensors.update(dict.fromkeys(held))
    yield
    tensors.update(held)


def fuses(hidden: Tensor) -> bool:
    """Whether the fused path serves these rows: bfloat16 on an NVIDIA GPU from Ampere on, with Triton."""
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and _gpu_fuses(hidden.device)


@functools.cache
def _gpu_fuses(device: torch.device) -> bool:
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)
