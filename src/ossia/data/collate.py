"""Rows to tensors: padded, or packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
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
    `cu_seq_lens_q` int32 [rows + 1] and `max_length_q`; `real` uint8 [B, S] is 0 on padding. The first token of a row
    carries no loss, since nothing before it predicts it.

    What would otherwise have to be read back from the GPU comes along: `tokens`, how many the rows have, and `kept`
    int64 [N], the flattened positions whose next token carries loss.
    """

    pad_id: int

    def __call__(self, rows: Sequence[TokenRow] | Sequence[list[TokenRow]]) -> dict[str, Any]:
        if isinstance(rows[0], TokenRow):
            return self._padded(rows)  # type: ignore[arg-type]
        return self.packed(rows)  # type: ignore[arg-type]

    def _padded(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        batch = _Sequences(len(rows), max(map(len, rows)), self.pad_id)
        mask = np.zeros_like(batch.input_ids)
        for index, row in enumerate(rows):
            batch.put(index, 0, row)
            mask[index, : len(row)] = 1
        return {**batch.tensors(), "attention_mask": torch.from_numpy(mask)}

    def packed(self, sequences: Sequence[Sequence[TokenRow]], length: int = 0) -> dict[str, Any]:
        """Packed rows; sequences are filled up to `length` tokens where they are shorter."""
        length = max(length, *(sum(map(len, rows)) for rows in sequences))
        batch = _Sequences(len(sequences), length, self.pad_id)
        positions, real = np.zeros_like(batch.input_ids), np.zeros(batch.input_ids.shape, np.uint8)
        sizes: list[int] = []
        for index, rows in enumerate(sequences):
            start = 0
            for row in rows:
                batch.put(index, start, row)
                batch.loss_weights[index, start] = 0
                positions[index, start : start + len(row)] = np.arange(len(row))
                sizes.append(len(row))
                start += len(row)
            real[index, :start] = 1
            if start < length:
                positions[index, start:] = np.arange(length - start)
                sizes.append(length - start)
        return {
            **batch.tensors(),
            "position_ids": torch.from_numpy(positions),
            "real": torch.from_numpy(real),
            "cu_seq_lens_q": torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32),
            "max_length_q": max(sizes),
        }


class _Sequences:
    def __init__(self, count: int, length: int, pad_id: int) -> None:
        self.input_ids = np.full((count, length), pad_id, np.int64)
        self.labels = self.input_ids.copy()
        self.loss_weights = np.zeros((count, length), np.float32)
        self.channels = np.zeros((count, length), np.uint8)
        self._tokens = 0

    def put(self, index: int, start: int, row: TokenRow) -> None:
        place = slice(start, start + len(row))
        self.input_ids[index, place] = row.input_ids
        self.labels[index, place] = row.labels
        self.loss_weights[index, place] = row.loss_weights
        if row.channels is not None:
            self.channels[index, place] = row.channels
        self._tokens += len(row)

    def tensors(self) -> dict[str, Any]:
        rows, before = np.nonzero(self.loss_weights[:, 1:])
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        arrays["kept"] = rows * self.loss_weights.shape[1] + before
        return {**{name: torch.from_numpy(value) for name, value in arrays.items()}, "tokens": self._tokens}


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch's tensors there; the copy to a GPU waits for nothing."""
    if device.type != "cuda":
        return batch
    return {
        name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
