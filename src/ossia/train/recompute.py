"""Carries out a plan: what layers keep from forward to backward, and where it waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ossia.kernels.expert_mlp import Memory, recomputing
from ossia.model.experts import Experts
from ossia.model.gpt_oss import OssiaGptOssForCausalLM
from ossia.train.plan import Plan


def apply_plan(model: nn.Module, plan: Plan, dropout: bool = False) -> None:
    """Set a gpt-oss model, with or without adapters, to a plan.

    Args:
        model: loaded with `plan.offload()` in host memory.
        plan: from `make_plan`.
        dropout: whether adapters drop inputs, so that random states have to be restored.
    """
    inner = next(module for module in model.modules() if isinstance(module, OssiaGptOssForCausalLM))
    inner.loss_chunk = plan.loss_chunk
    device = inner.lm_head.weight.device
    again = _again(HostStore(device) if plan.inputs_on_host else None, dropout)
    layers = inner.model.layers
    for number, (layer, kind) in enumerate(zip(layers, plan.recompute, strict=True)):
        layer.gradient_checkpointing = kind == "layer"
        layer._gradient_checkpointing_func = again
        experts = next(module for module in layer.modules() if isinstance(module, Experts))
        experts.memory = Memory(keep=kind != "experts", experts=plan.experts_at_once)
        if number >= len(layers) - plan.held_layers:
            experts.hold_expanded(plan.sizes.tail)


def _again(offload: HostStore | None, dropout: bool) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        with offload.saving() if offload else contextlib.nullcontext():
            return checkpoint(
                function,
                *args,
                use_reentrant=False,
                preserve_rng_state=dropout,
                context_fn=lambda: (contextlib.nullcontext(), recomputing()),
            )

    return run


class HostStore:
    """Tensors saved for backward wait in pinned host memory; each comes back while the one before it is used.

    Copies run on their own stream, beside the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.held: list[_Held] = []

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, what autograd saves goes to the host, unless it is small."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        if not tensor.is_cuda or tensor.nbytes < 1 << 20:
            return tensor
        held = _Held(tensor, self.stream)
        held.place = len(self.held)
        self.held.append(held)
        return held

    def _unpack(self, held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        tensor = held.take(self.stream)
        del self.held[held.place :]
        if self.held:
            self.held[-1].fetch(self.stream)
        return tensor


class _Held:
    place = 0

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.device = tensor.device
        self.back: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self, stream: torch.cuda.Stream) -> None:
        if self.back is None:
            with torch.cuda.stream(stream):
                self.back = self.host.to(self.device, non_blocking=True)

    def take(self, stream: torch.cuda.Stream) -> Tensor:
        self.fetch(stream)
        torch.cuda.current_stream().wait_stream(stream)
        assert self.back is not None
        self.back.record_stream(torch.cuda.current_stream())
        tensor, self.back = self.back, None
        return tensor
