"""Which rows are nearly the same: MinHash over five-character shingles, and groups of rows that share a band.

Eight bands of eight hashes: two rows of Jaccard similarity s meet with probability 1 - (1 - s^8)^8, that is 0.99 at
0.9, 0.77 at 0.8, 0.37 at 0.7 and 0.03 at 0.5. Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ossia.template.messages import Conversation

BANDS = 8
_ROWS = 8
_SHINGLE = 5
_GAPS = re.compile(r"\W+")
_CHANCE = np.random.default_rng(0)
_FACTORS = _CHANCE.integers(0, 2**32, (_SHINGLE, 1), np.uint64) | np.uint64(1)
_A = _CHANCE.integers(0, 2**32, (BANDS * _ROWS, 1), np.uint32) | np.uint32(1)
_B = _CHANCE.integers(0, 2**32, (BANDS * _ROWS, 1), np.uint32)
_JOIN = _CHANCE.integers(0, 2**63, (1, _ROWS), np.uint64) | np.uint64(1)


def signature(conversation: Conversation) -> NDArray[np.uint64]:
    """One hash per band, [8], of what is asked and answered; letters and digits only, case ignored."""
    parts = [conversation.text or ""]
    parts += [f"{m.thinking or ''} {m.content}" for m in conversation.messages if m.role in ("user", "assistant")]
    text = _GAPS.sub("", " ".join(parts)).casefold().ljust(_SHINGLE)
    chars = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    size = len(chars) - _SHINGLE + 1
    mixed = sum(chars[i : i + size] * _FACTORS[i] for i in range(_SHINGLE))
    shingles = np.unique((mixed * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).astype(np.uint32))
    least = np.full(BANDS * _ROWS, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), 4096):
        np.minimum(least, (shingles[None, start : start + 4096] * _A + _B).min(1), out=least)
    return (least.reshape(BANDS, _ROWS).astype(np.uint64) * _JOIN).sum(1, dtype=np.uint64)


def groups(signatures: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The group of each row, from signatures [N, 8]: rows that share any band, directly or through others."""
    count = len(signatures)
    label: NDArray[np.int64] = np.arange(count)
    keys = [np.unique(signatures[:, band], return_inverse=True)[1] for band in range(BANDS)]
    while True:
        before: Any = label.copy()
        for key in keys:
            least = np.full(key.max(initial=-1) + 1, count)
            np.minimum.at(least, key, label)
            label = least[key]
        if np.array_equal(label, before):
            return label
