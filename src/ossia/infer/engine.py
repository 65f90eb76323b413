"""Generation: prompts as token ids in, answers as token ids out, many at a time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from ossia.errors import UsageError
from ossia.infer.gpt_oss import GptOssRunner, runs
from ossia.infer.runner import CachedRunner, Runner
from ossia.infer.sampling import Draw, Sampling, Token, choose
from ossia.template.base import Template

__all__ = ["Engine", "Request", "Sampling", "Token"]

Allowed = Callable[[list[int]], Tensor | None]
"""From the answer's ids so far, which ids may come next: bool [V], or None for any."""

_DEFAULT: Any = object()
_PROMPT_TOKENS = 16384
"""No prompt starts in a step behind so many tokens of others."""


def _nothing() -> None: ...


class Request:
    """One prompt on its way. `finish_reason` is None while it runs; an end token is the last of `tokens`."""

    def __init__(self, prompt: list[int], sampling: Sampling, adapter: str | None, allowed: Allowed | None) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.adapter = adapter
        self.allowed = allowed
        self.tokens: list[Token] = []
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self._random = random.Random(sampling.seed)

    @property
    def ids(self) -> list[int]:
        """The answer so far."""
        return [token.id for token in self.tokens]

    def draw(self) -> Draw:
        """What its next token depends on besides logits; each token takes one number."""
        allowed = None if self.allowed is None else self.allowed(self.ids)
        return Draw(self.sampling, self._random.random(), allowed)


class Engine:
    """A model with its template, in evaluation mode. One thread at a time may use it."""

    def __init__(
        self,
        model: Any,
        template: Template,
        *,
        adapters: dict[str, str] | None = None,
        max_batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        """Take a model as `load_model` or `load_adapter` gives it.

        Args:
            model: any causal language model of transformers, or a PEFT model of one.
            template: whose end tokens end an answer.
            adapters: PEFT's name for each name that requests use; default: PEFT's own.
            max_batch_size: requests that are decoded at a time.
            max_length: tokens that a prompt and its answer may have; default: as many as the model knows, and as its
                cache holds.
        """
        self.model = model.eval()
        self.template = template
        self.max_batch_size = max_batch_size
        held = {name: name for name in model.peft_config} if isinstance(model, PeftModel) else {}
        self._adapters = held if adapters is None else adapters
        self.adapters = list(self._adapters)
        known = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        limit = min(known, max_length or known)
        self._runner: Runner = GptOssRunner(model, limit, max_batch_size) if runs(model) else CachedRunner(model, limit)
        self.max_length = self._runner.max_length
        self._waiting: deque[Request] = deque()
        self._active: dict[int, Request] = {}
        self._default = self.adapters[0] if self.adapters else None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._active)

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        adapter: str | None = _DEFAULT,
        allowed: Allowed | None = None,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt: token ids, at least one.
            sampling: how tokens are chosen.
            adapter: one of `adapters`; None: the base alone; default: the first, if there is one.
            allowed: asked before each token which ids may come.

        Raises:
            UsageError: a prompt that leaves no room for an answer, or an unknown adapter.
        """
        adapter = self._default if adapter is _DEFAULT else adapter
        if adapter is not None and adapter not in self._adapters:
            raise UsageError(f"no adapter {adapter!r}; there is {', '.join(self.adapters) or 'none'}")
        if not 0 < len(prompt) < self.max_length:
            raise UsageError(
                f"the prompt has {len(prompt):,} tokens; with room for an answer it may have 1 to "
                f"{self.max_length - 1:,}"
            )
        request = Request(prompt, sampling, adapter, allowed)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request and free its place; nothing where it has ended."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)
        for place, active in list(self._active.items()):
            if active is request:
                self._free(place)

    @torch.inference_mode()
    def step(self, meanwhile: Callable[[], None] = _nothing) -> list[tuple[Request, Token]]:
        """Start what waits and fits, then decode one token for every request; the tokens that came, in order.

        Args:
            meanwhile: called once, on a GPU when it is busy with the first tokens, else at the beginning.
        """
        if self._waiting or self.model.device.type == "cpu":
            meanwhile()
            meanwhile = _nothing
        came = self._admit()
        for adapter in dict.fromkeys(request.adapter for request in self._active.values()):
            places = [place for place, request in self._active.items() if request.adapter == adapter]
            last = [self._active[place].tokens[-1].id for place in places]
            logits_BV = self._runner.step(places, last, self._peft_name(adapter))
            meanwhile()
            meanwhile = _nothing
            came += self._take(places, logits_BV)
        return came

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_token: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Answers to `prompts`, end token included where one was reached.

        Args:
            prompts: token ids.
            sampling: how tokens are chosen.
            on_token: called with each token as it comes; for one prompt only.
        """
        requests = [self.submit(prompt, sampling) for prompt in prompts]
        try:
            while any(request.finish_reason is None for request in requests):
                for request, token in self.step():
                    if on_token is not None and request in requests:
                        on_token(token.id)
        finally:
            for request in requests:
                self.cancel(request)
        return [request.ids for request in requests]

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        default, self._default = self._default, None
        try:
            yield
        finally:
            self._default = default

    def without_adapter(self) -> Any:
        """A context in which requests ask the base model alone by default; UsageError where there is no adapter."""
        if not self.adapters:
            raise UsageError("there is no adapter; ossia infer --adapters RUN/checkpoint-N talks to one")
        return self._base_alone()

    def _admit(self) -> list[tuple[Request, Token]]:
        """Start requests in their order, as many as fit; of many long prompts some now, to keep the others going."""
        admitted: dict[str | None, list[int]] = {}
        read = 0
        while self._waiting and len(self._active) < self.max_batch_size and read < _PROMPT_TOKENS:
            request = self._waiting[0]
            place = min(set(range(self.max_batch_size)) - self._active.keys())
            tokens = min(len(request.prompt) + request.sampling.max_new_tokens, self.max_length)
            if not self._runner.reserve(place, tokens):
                break
            self._waiting.popleft()
            self._active[place] = request
            admitted.setdefault(request.adapter, []).append(place)
            read += len(request.prompt)
        came: list[tuple[Request, Token]] = []
        for adapter, places in admitted.items():
            prompts = [self._active[place].prompt for place in places]
            came += self._take(places, self._runner.start(places, prompts, self._peft_name(adapter)))
        return came

    def _take(self, places: list[int], logits_BV: Tensor) -> list[tuple[Request, Token]]:
        """Choose the next token at each place; requests that end leave theirs."""
        requests = [self._active[place] for place in places]
        came = list(zip(requests, choose(logits_BV, [request.draw() for request in requests]), strict=True))
        for place, (request, token) in zip(places, came, strict=True):
            request.tokens.append(token)
            count = len(request.tokens)
            if token.id in self.template.stop_ids and not request.sampling.ignore_eos:
                request.finish_reason = "stop"
            elif count >= request.sampling.max_new_tokens or len(request.prompt) + count >= self.max_length:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                self._free(place)
        return came

    def _free(self, place: int) -> None:
        del self._active[place]
        self._runner.free(place)

    def _peft_name(self, adapter: str | None) -> str | None:
        return None if adapter is None else self._adapters[adapter]
