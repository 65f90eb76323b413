"""Rows to padded tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ossia.data.prepare import TokenRow


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest row: ids and labels int64, mask int64, loss weights float32, each [B, S].

    Padding has weight 0 and is masked.
    """

    pad_id: int

    def __call__(self, rows: list[TokenRow]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "labels": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "loss_weights": torch.zeros(shape),
        }
        for index, row in enumerate(rows):
            n = len(row)
            batch["input_ids"][index, :n] = torch.tensor(row.input_ids)
            batch["labels"][index, :n] = torch.tensor(row.labels)
            batch["loss_weights"][index, :n] = torch.tensor(row.loss_weights)
            batch["attention_mask"][index, :n] = 1
        return batch
