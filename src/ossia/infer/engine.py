"""Generation: prompts as token ids in, replies as token ids out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ossia.errors import UsageError
from ossia.template.base import Template


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token always; `max_new_tokens` bounds a reply."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048


class Engine:
    """A model with its template, in evaluation mode."""

    def __init__(self, model: PreTrainedModel | Any, template: Template) -> None:
        self.model = model.eval()
        self.template = template

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_token: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Replies to `prompts`, end token included where one was reached.

        Args:
            prompts: token ids; padded on the left to one length.
            sampling: how tokens are chosen.
            on_token: called with each token as it comes; for one prompt only.
        """
        length = max(map(len, prompts))
        device = self.model.device
        ids = torch.full((len(prompts), length), self.template.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._config(sampling),
                streamer=_TokenStreamer(on_token) if on_token else None,
            )
        return [self._trim(row) for row in output[:, length:].tolist()]

    def without_adapter(self) -> AbstractContextManager[Any]:
        """A context in which the base model alone answers; UsageError where there is no adapter."""
        if not isinstance(self.model, PeftModel):
            raise UsageError("there is no adapter; ossia infer --adapters RUN/checkpoint-N talks to one")
        return self.model.disable_adapter()

    def _config(self, sampling: Sampling) -> GenerationConfig:
        stop = self.template.stop_ids
        greedy = sampling.temperature == 0
        chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=stop,
            pad_token_id=self.template.pad_id,
            **chosen,
        )

    def _trim(self, ids: list[int]) -> list[int]:
        stops = [index for index, token in enumerate(ids) if token in self.template.stop_ids]
        return ids[: stops[0] + 1] if stops else ids


class _TokenStreamer(BaseStreamer):
    """Passes each new token on; the prompt comes first and is not passed."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None:
        pass
