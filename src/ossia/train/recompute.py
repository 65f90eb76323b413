"""Carries out a plan: what layers keep from forward to backward, and where it waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        layer.self_attn.stack()
        experts = next(module for module in layer.modules() if isinstance(module, Experts))
        experts.memory = Memory(kind != "experts", plan.experts_at_once, plan.reuse_expanded)
        if number >= len(layers) - plan.held_layers:
            experts.hold_expanded(plan.sizes.tail)


class _Again(torch.autograd.Function):
    """A layer that keeps its input alone. torch's checkpoint does as much, at a Python call for every tensor that the
    layer would keep, and cannot leave out what only the output needs."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], store: HostStore | None, dropout: bool, x: Tensor, _: Tensor
    ) -> Tensor:
        kind = x.device.type
        ctx.run, ctx.held = run, None
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        ctx.states = _random_states(x.device) if dropout else None
        out = run(x)
        if store is None:
            ctx.save_for_backward(x)
        else:
            ctx.held = store.put(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = (ctx.saved_tensors[0] if ctx.held is None else ctx.held.take()).detach().requires_grad_()
        kind = x.device.type
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(kind, **ctx.autocast))
            stack.enter_context(recomputing())
            if ctx.states is not None:
                stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else [], device_type=kind))
                torch.set_rng_state(ctx.states[0])
                if x.is_cuda:
                    torch.cuda.set_rng_state(ctx.states[1], x.device)
            out = ctx.run(x)
        torch.autograd.backward(out, grads[0])
        return None, None, None, x.grad if ctx.needs_input_grad[3] else None, None


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _again(store: HostStore | None, dropout: bool) -> Callable[..., Tensor]:
    """In the place of transformers' checkpointing function: takes a layer and its input."""
    # The first layer's input needs no gradient, but its adapters do.
    anchor = torch.empty(0, requires_grad=True)

    def call(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # What no backward will ask for must not wait in the store.
        return _Again.apply(run, store, dropout, x, anchor) if torch.is_grad_enabled() else run(x)

    return call


class HostStore:
    """Tensors wait in pinned host memory; each comes back while the one put after it is used.

    Copies run on their own stream, beside the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.held: list[Held] = []

    def put(self, tensor: Tensor) -> Held:
        """Take a tensor; it must not change any more."""
        self.held.append(Held(self, tensor))
        return self.held[-1]


class Held:
    """A tensor's copy on the host."""

    def __init__(self, store: HostStore, tensor: Tensor) -> None:
        self.store, self.place, self.device = store, len(store.held), tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.back: Tensor | None = None
        store.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(store.stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(store.stream)

    def take(self) -> Tensor:
        """The tensor on its device again, once; the one before it sets out."""
        self._fetch()
        torch.cuda.current_stream().wait_stream(self.store.stream)
        tensor, self.back = self.back, None
        assert tensor is not None
        tensor.record_stream(torch.cuda.current_stream())
        del self.store.held[self.place :]
        if self.store.held:
            self.store.held[-1]._fetch()
        return tensor

    def _fetch(self) -> None:
        if self.back is None:
            with torch.cuda.stream(self.store.stream):
                self.back = self.host.to(self.device, non_blocking=True)
