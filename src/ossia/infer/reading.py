"""Run several texts per forward pass, packed where the model keeps them apart, for per-token outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from ossia.model import attention
from ossia.model.packed import keeps_apart

_SPAN = 512
"""Tokens of a pass where attention materialises the full S x S score matrix."""


class Reading(NamedTuple):
    """One pass.

    Args:
        places: where each of its texts lies: first token, and the one after its last.
        inputs: what the model takes, beside what the caller asks of it.
    """

    places: list[tuple[int, int]]
    inputs: dict[str, Any]


def readings(model: Any, texts: Sequence[list[int]], tokens: int) -> Iterator[Reading]:
    """Texts in their order, several a pass where the model keeps them apart; a batch of one sequence, without padding.

    Args:
        model: that reads.
        texts: token ids.
        tokens: of a pass at most; a longer text has one to itself.
    """
    linear = getattr(model.config, "_attn_implementation", None) == attention.NAME
    room = tokens if linear else min(tokens, _SPAN)
    if not keeps_apart(model):
        room = 0
    together: list[list[int]] = []
    for text in texts:
        if together and sum(map(len, together)) + len(text) > room:
            yield _reading(model, together, linear)
            together = []
        together.append(text)
    if together:
        yield _reading(model, together, linear)


def _reading(model: Any, texts: list[list[int]], linear: bool) -> Reading:
    bounds = [0, *accumulate(map(len, texts))]
    places = list(pairwise(bounds))
    device = model.device

    def put(values: list[int]) -> Any:
        return torch.tensor([values], device=device)

    inputs: dict[str, Any] = {"input_ids": put([token for text in texts for token in text])}
    if len(texts) > 1:
        inputs["position_ids"] = put([place for text in texts for place in range(len(text))])
        if linear:
            inputs["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32, device=device)
            inputs["max_length_q"] = max(map(len, texts))
    return Reading(places, inputs)
