"""How tokens are chosen. B rows, V ids of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token always; `top_p` is the share of probability that is drawn from;
    `max_new_tokens` bounds a reply. The same `seed`, prompt and settings draw the same numbers, whatever else is in the
    batch; None: others each time. `top_logprobs`: None for no log-probabilities, 0 for the chosen token's, n for those
    of the n likeliest as well. `ignore_eos`: no token ends a reply before `max_new_tokens`."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    seed: int | None = None
    top_logprobs: int | None = None
    ignore_eos: bool = False


class Token(NamedTuple):
    """A token of an answer; natural log-probabilities under the model's own distribution (temperature 1, no top_p)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draw(NamedTuple):
    """What a row's choice depends on besides its logits: settings, a number in [0, 1), the ids that may come."""

    sampling: Sampling
    number: float
    allowed: Tensor | None = None


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Token]:
    """A token for each row. Waits for the device once, and once more where log-probabilities are asked for."""
    masked_BV = _masked(logits_BV, draws)
    ids_B = masked_BV.argmax(-1)
    for nucleus in (False, True):
        rows = [
            row
            for row, draw in enumerate(draws)
            if draw.sampling.temperature > 0 and (draw.sampling.top_p < 1) is nucleus
        ]
        if rows:
            ids_B[rows] = _drawn(masked_BV[rows], [draws[row] for row in rows], nucleus)
    ids = ids_B.tolist()
    wanted = [row for row, draw in enumerate(draws) if draw.sampling.top_logprobs is not None]
    if not wanted:
        return [Token(id) for id in ids]
    tokens = [Token(id) for id in ids]
    log_BV = logits_BV[wanted].float().log_softmax(-1)
    own = log_BV.gather(1, ids_B[wanted, None])[:, 0].tolist()
    counts = [draws[row].sampling.top_logprobs or 0 for row in wanted]
    best, best_ids = (x.tolist() for x in log_BV.topk(min(max(counts), log_BV.shape[1])))
    for place, (row, count) in enumerate(zip(wanted, counts, strict=True)):
        top = tuple(zip(best_ids[place][:count], best[place][:count], strict=True))
        tokens[row] = Token(ids[row], own[place], top)
    return tokens


def _masked(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    if all(draw.allowed is None for draw in draws):
        return logits_BV
    masked_BV = logits_BV.clone()
    for row, draw in zip(masked_BV, draws, strict=True):
        if draw.allowed is not None:
            row.masked_fill_(~draw.allowed.to(row.device), float("-inf"))
    return masked_BV


def _drawn(logits_BV: Tensor, draws: Sequence[Draw], nucleus: bool) -> Tensor:
    """Ids [B] where each row's cumulated probabilities pass its number; with `nucleus` of the likeliest alone, which
    together reach `top_p`."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    share_BV = (logits_BV.float() / column([draw.sampling.temperature for draw in draws])).softmax(-1)
    order_BV = None
    if nucleus:
        share_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = share_BV.cumsum(-1) - share_BV
        share_BV = share_BV.masked_fill(before_BV >= column([draw.sampling.top_p for draw in draws]), 0.0)
    sum_BV = share_BV.cumsum(-1)
    at_B1 = torch.searchsorted(sum_BV, column([draw.number for draw in draws]) * sum_BV[:, -1:], right=True)
    at_B1.clamp_(max=sum_BV.shape[1] - 1)
    return (at_B1 if order_BV is None else order_BV.gather(1, at_B1))[:, 0]
