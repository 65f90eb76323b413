"""Rows of an optimizer step in as few forward and backward passes as they fit into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ossia.data.collate import Collator
from ossia.data.packing import bucket, pack
from ossia.data.store import TokenRow

_PADDING = 0.03
"""Share of a padded batch that may be padding where rows could be laid end to end instead."""
_ALIKE = 0.75
"""Where they could not: a row joins longer ones if it has at least this share of the longest one's tokens."""


@dataclass(frozen=True)
class Passes:
    """How rows become batches, one for each pass through the model.

    Rows are laid end to end, each seeing only itself, or side by side where they are of (nearly) one length, which
    needs no bounds. The fewest batches that hold them all are filled evenly: two halves take less time and memory than
    a full one and a rest. A batch of rows end to end is filled up to one of 64 lengths between powers of two.

    Args:
        pad_id: token that fills.
        capacity: tokens of a batch at most, padding included; a longer row has one to itself.
        end_to_end: False: the model lets packed rows see each other, so they are padded, short ones apart from long.
        span: tokens that are laid end to end at most, where attention makes tables of all pairs. None: as many as fit.
    """

    pad_id: int
    capacity: int
    end_to_end: bool = True
    span: int | None = None

    def groups(self, lengths: Sequence[int], least: int = 1) -> list[list[int]]:
        """Rows of each batch, by their places; no fewer than `least` batches, of which some may be empty.

        Args:
            lengths: tokens of each row.
            least: batches that other processes have.
        """
        found = self._packed(lengths) if self.end_to_end else self._of_like_length(lengths)
        while len(found) < least:
            largest = max(range(len(found)), key=lambda number: len(found[number]))
            rows = found[largest]
            found[largest] = rows[::2]
            found.append(rows[1::2])
        return found

    def batches(self, rows: Sequence[TokenRow], least: int = 1) -> list[dict[str, Any]]:
        """The batches of `rows`; an empty one has a row that counts for nothing."""
        found = self.groups([len(row) for row in rows], least)
        return [
            self.batch([rows[row] for row in group])
            if group
            else {**self.batch([weightless(min(rows, key=len))]), "tokens": 0}
            for group in found
        ]

    def computed(self, lengths: Sequence[int]) -> int:
        """Tokens that a batch of such rows computes, padding included."""
        return len(lengths) * max(lengths) if self._side_by_side(lengths) else self._filled(sum(lengths))

    def batch(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """One batch of all these rows."""
        lengths = [len(row) for row in rows]
        collate = Collator(self.pad_id)
        return collate(rows) if self._side_by_side(lengths) else collate.packed([rows], self._filled(sum(lengths)))

    def _filled(self, tokens: int) -> int:
        return min(bucket(tokens), max(self.capacity, tokens))

    def _side_by_side(self, lengths: Sequence[int]) -> bool:
        square, tokens = len(lengths) * max(lengths), sum(lengths)
        fits = len(lengths) == 1 or square <= self.capacity
        return not self.end_to_end or (square - tokens <= _PADDING * square and fits)

    def _packed(self, lengths: Sequence[int]) -> list[list[int]]:
        room = self.capacity if self.span is None else min(self.capacity, self.span)
        short = [row for row, length in enumerate(lengths) if length <= room]
        alone = [[row] for row, length in enumerate(lengths) if length > room]
        return [*alone, *([short[place] for place in group] for group in _evenly([lengths[r] for r in short], room))]

    def _of_like_length(self, lengths: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
            group = found[-1] if found else []
            longest = lengths[group[0]] if group else 0
            alike = lengths[row] >= _ALIKE * longest
            if group and alike and (len(group) + 1) * longest <= self.capacity:
                group.append(row)
            else:
                found.append([row])
        return found


def _evenly(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The fewest groups of at most `room` tokens, the fullest as small as can be."""
    found = pack(lengths, room)
    if len(found) < 2:
        return found
    low, high = max(max(lengths), -(-sum(lengths) // len(found))), room
    while low < high:
        middle = (low + high) // 2
        tried = pack(lengths, middle)
        if len(tried) == len(found):
            found, high = tried, middle
        else:
            low = middle + 1
    return found


def weightless(row: TokenRow) -> TokenRow:
    """The row without its loss."""
    return TokenRow(row.input_ids, row.labels, np.zeros_like(row.loss_weights), row.channels)
