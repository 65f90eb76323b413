"""Rows to tensors: padded, or packed end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ossia.data.store import TokenRow


@dataclass(frozen=True)
class Collator:
    """Rows, or sequences of packed rows, to a batch: ids and labels int64, loss weights float32, channels uint8 (places
    in `store.CHANNELS`), each [B, S].

    Rows are padded on the right to the longest; `attention_mask` int64 [B, S] tells. Padding has weight 0.

    Packed rows are laid end to end. In place of a mask the batch has `position_ids` int64 [B, S], which restart with
    every row (and with the padding), and the same bounds as transformers names them, for the flattened batch:
    `cu_seq_lens_q` int32 [rows + 1] and `max_length_q`. The first token of a row carries no loss, since nothing before
    it predicts it.
    """

    pad_id: int

    def __call__(self, rows: list[TokenRow] | list[list[TokenRow]]) -> dict[str, Any]:
        if isinstance(rows[0], TokenRow):
            return self._padded(rows)
        return self._packed(rows)

    def _padded(self, rows: list[TokenRow]) -> dict[str, Any]:
        batch = _Sequences(len(rows), max(map(len, rows)), self.pad_id)
        mask = np.zeros_like(batch.input_ids)
        for index, row in enumerate(rows):
            batch.put(index, 0, row)
            mask[index, : len(row)] = 1
        return {**batch.tensors(), "attention_mask": torch.from_numpy(mask)}

    def _packed(self, sequences: list[list[TokenRow]]) -> dict[str, Any]:
        length = max(sum(map(len, rows)) for rows in sequences)
        batch = _Sequences(len(sequences), length, self.pad_id)
        positions = np.zeros_like(batch.input_ids)
        sizes: list[int] = []
        for index, rows in enumerate(sequences):
            start = 0
            for row in rows:
                batch.put(index, start, row)
                batch.loss_weights[index, start] = 0
                positions[index, start : start + len(row)] = np.arange(len(row))
                sizes.append(len(row))
                start += len(row)
            if start < length:
                positions[index, start:] = np.arange(length - start)
                sizes.append(length - start)
        return {
            **batch.tensors(),
            "position_ids": torch.from_numpy(positions),
            "cu_seq_lens_q": torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32),
            "max_length_q": max(sizes),
        }


class _Sequences:
    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self.input_ids = np.full((count, length), pad_id, np.int64)
        self.labels = self.input_ids.copy()
        self.loss_weights = np.zeros((count, length), np.float32)
        self.channels = np.zeros((count, length), np.uint8)

    def put(self, index: int, start: int, row: TokenRow) -> None:
        place = slice(start, start + len(row))
        self.input_ids[index, place] = row.input_ids
        self.labels[index, place] = row.labels
        self.loss_weights[index, place] = row.loss_weights
        if row.channels is not None:
            self.channels[index, place] = row.channels

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}


def tokens_of(batch: dict[str, Any]) -> int | Tensor:
    """Tokens of a batch without padding, where its mask tells; else with it."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()
