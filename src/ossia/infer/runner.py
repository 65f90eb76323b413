"""What the engine asks of a model: prompts in, logits out, with the keys and values of every request kept between."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from ossia.compat import cache_name


class Runner(Protocol):
    """A model with places for so many requests. An adapter is PEFT's name of it; None: the base alone."""

    max_length: int

    def reserve(self, place: int, tokens: int) -> bool:
        """Take room for a request of so many tokens, prompt and answer; False where there is none now."""
        ...

    def start(self, places: Sequence[int], prompts: Sequence[list[int]], adapter: str | None) -> Tensor:
        """Logits [B, V] after prompts, whose places are reserved."""
        ...

    def step(self, places: Sequence[int], tokens: Sequence[int], adapter: str | None) -> Tensor:
        """Logits [B, V] after one more token at each place; valid until the next call."""
        ...

    def free(self, place: int) -> None:
        """Forget what is at a place, if anything."""
        ...


class CachedRunner:
    """Any causal model of transformers, each request with the model's own cache, one forward a request."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self._caches: dict[int, Any] = {}
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._cache_name = cache_name(base.forward)

    def reserve(self, place: int, tokens: int) -> bool:
        self._caches[place] = DynamicCache(config=self.model.config)
        return True

    def start(self, places: Sequence[int], prompts: Sequence[list[int]], adapter: str | None) -> Tensor:
        return torch.stack(
            [self._forward(place, prompt, adapter) for place, prompt in zip(places, prompts, strict=True)]
        )

    def step(self, places: Sequence[int], tokens: Sequence[int], adapter: str | None) -> Tensor:
        return torch.stack(
            [self._forward(place, [token], adapter) for place, token in zip(places, tokens, strict=True)]
        )

    def free(self, place: int) -> None:
        self._caches.pop(place, None)

    def _forward(self, place: int, ids: list[int], adapter: str | None) -> Tensor:
        with with_adapter(self.model, adapter):
            out = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: self._caches[place]},
            )
        self._caches[place] = getattr(out, self._cache_name)
        return out.logits[0, -1]


def with_adapter(model: Any, adapter: str | None) -> AbstractContextManager[Any]:
    """A context in which a model computes with that adapter, or with none."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    if adapter is None:
        return model.disable_adapter()
    if model.active_adapters != [adapter]:
        model.set_adapter(adapter, inference_mode=True)
    return nullcontext()
